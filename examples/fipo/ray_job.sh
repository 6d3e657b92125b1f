# shellcheck shell=bash
# Submits a command as a Ray job and follows it. Sourced by every launch script here; knows nothing about training.
#
# Read from the environment:
#   RAY_ADDRESS      http://HOST:PORT of a cluster's job API (its dashboard). Empty: start a Ray of our own on this node
#                    and stop it, and nothing else, at the end. Other Rays on the host are left alone.
#   RAY_PORT, RAY_DASHBOARD_PORT, RAY_AGENT_PORT, RAY_CLIENT_PORT    ports of a Ray of our own
#   RAY_JOB_STOP_WAIT_TIME_S    seconds that a stopped job may take to end by itself (Ray's own variable; 60)
#   PASS_ENV         variables of yours that the job gets, names or patterns: "WANDB_API_KEY NCCL_* HF_*". A Ray of our
#                    own inherits your environment anyway; a given cluster does not.
#   no_proxy, NO_PROXY    kept; this node and the job API's host are added, here and in the job
#   DRY_RUN=1        print the command and do nothing; the values of PASS_ENV's variables are hidden

RAY_PID=
SUBMIT_PID=
JOB_ID=
RUNTIME_ENV_FILE=
RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-60}"

# require PROGRAM WHAT_TO_DO: ends the script where a program is missing
require() {
   if ! command -v "$1" >/dev/null; then
      echo "$1 is not on PATH: $2" >&2
      exit 2
   fi
}
require python3 "activate the environment that has slime and Ray, or run this in slime's container"
[[ ${DRY_RUN:-0} == 1 || ${REHEARSE:-0} == 1 ]] || require ray "pip install 'ray[default]', or run this in slime's container"

# quoted WORD...: the words as one line that a shell reads back as the same words
quoted() {
   local line
   printf -v line '%q ' "$@"
   printf '%s\n' "${line% }"
}

# own_hosts: the names and addresses of this node, as Ray, SGLang and slime may find them
own_hosts() {
   local host="${RAY_ADDRESS:-}"
   host="${host#*://}"
   host="${host%%/*}"
   host="${host%:*}"
   echo localhost 127.0.0.1 0.0.0.0 "${MASTER_ADDR:-}" "${host}" "$(uname -n)"
   hostname -I 2>/dev/null || getent ahosts "$(uname -n)" | cut -d ' ' -f 1
}

# no_proxy_with HOST...: the user's no_proxy and NO_PROXY and these hosts, each once
no_proxy_with() {
   local host joined=
   local -a hosts
   IFS=$', \t\n' read -r -d '' -a hosts <<<"${no_proxy:-},${NO_PROXY:-},$*" || true
   for host in "${hosts[@]}"; do
      # An asterisk means every host, but only where it stands by itself.
      if [[ ${host} == '*' ]]; then
         joined='*'
         break
      fi
      [[ -z ${host} || ",${joined}," == *",${host},"* ]] || joined+="${joined:+,}${host}"
   done
   echo "${joined}"
}

# runtime_env FORMAT NAME=VALUE...: Ray's runtime environment: these variables, PASS_ENV's, no_proxy, and what Ray's job
# supervisor, which stops a job and runs in it too, has to know. FORMAT is yaml, or json with PASS_ENV's values hidden.
runtime_env() {
   python3 - "$@" "no_proxy=${no_proxy:-}" "NO_PROXY=${NO_PROXY:-}" \
      "RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S}" <<'EOF'
import fnmatch
import json
import os
import sys

hidden = sys.argv[1] == "json"
passed = {}
for pattern in os.environ.get("PASS_ENV", "").replace(",", " ").split():
    if not set(pattern) & set("*?[") and pattern not in os.environ:
        sys.exit(f"PASS_ENV names {pattern}, which is not set: export it, or take it out of PASS_ENV")
    for name in set(fnmatch.filter(os.environ, pattern)) - {"RAY_ADDRESS"}:  # Ray gives the job its own
        passed[name] = "***" if hidden else os.environ[name]
variables = passed | dict(word.split("=", 1) for word in sys.argv[2:])
text = json.dumps({"env_vars": variables}, ensure_ascii=hidden)
# YAML knows JSON's escapes but not its surrogate pairs.
print(text if hidden else "".join(c if " " <= c <= "~" else f"\\U{ord(c):08x}" for c in text))
EOF
}

# check_ray WORD...: Ray can be imported, and its job API hands on these words as they are. Older Rays' `ray job submit`
# joins them by Windows' rules and gives the line to sh.
check_ray() {
   python3 - "$@" <<'EOF'
import re
import sys

try:
    from ray.dashboard.modules.job import cli
except ImportError as error:
    sys.exit(f"{sys.executable} cannot import Ray's job API ({error}): install 'ray[default]' there")

odd = [word for word in sys.argv[1:] if re.search(r"[$`'&;|<>()*?\\~#\n]", word)]
if odd and not hasattr(cli, "shlex"):
    sys.exit(f"this Ray does not quote {odd[0]!r} for the shell; upgrade Ray, or use a name without such characters")
EOF
}

# listening PORT: whether something on this host answers there
listening() {
   (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# own_ray GPUS [RESOURCE FLAGS...]: a Ray head on this node that ends with this script
own_ray() {
   local gpus="$1" port
   shift
   export RAY_PORT="${RAY_PORT:-6379}" RAY_DASHBOARD_PORT="${RAY_DASHBOARD_PORT:-8265}"
   # Ray's own default for the agent, 52365, is among those that Linux gives to any connection.
   RAY_AGENT_PORT="${RAY_AGENT_PORT:-8266}" RAY_CLIENT_PORT="${RAY_CLIENT_PORT:-10001}"
   for port in RAY_PORT RAY_DASHBOARD_PORT RAY_AGENT_PORT RAY_CLIENT_PORT; do
      if listening "${!port}"; then
         echo "port ${!port} is taken, perhaps by another Ray: set RAY_ADDRESS to use that one, or ${port} to another port" >&2
         exit 1
      fi
   done
   # Whoever reaches a Ray's ports can run code as its owner: ask for a token (older Rays ignore these).
   export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
   export RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
   # --block keeps every process of this Ray below ours; `ray stop` would end other people's, too.
   ray start --head --node-ip-address "${MASTER_ADDR:-127.0.0.1}" --port "${RAY_PORT}" --num-gpus "${gpus}" \
      --dashboard-host 127.0.0.1 --dashboard-port "${RAY_DASHBOARD_PORT}" \
      --dashboard-agent-listen-port "${RAY_AGENT_PORT}" --ray-client-server-port "${RAY_CLIENT_PORT}" \
      --min-worker-port 0 --max-worker-port 0 --disable-usage-stats --block "$@" &
   RAY_PID=$!
   RAY_ADDRESS="http://127.0.0.1:${RAY_DASHBOARD_PORT}"
   for _ in {1..120}; do
      if ! kill -0 "${RAY_PID}" 2>/dev/null; then
         RAY_PID=
         echo "ray start failed; its messages are above" >&2
         exit 1
      fi
      listening "${RAY_DASHBOARD_PORT}" && listening "${RAY_AGENT_PORT}" && return
      sleep 1
   done
   echo "Ray's job API did not come up at ${RAY_ADDRESS} within 120 s" >&2
   exit 1
}

# clean_up: end a Ray of our own and remove what the job was submitted with
clean_up() {
   if [[ -n ${RAY_PID} ]]; then
      kill -TERM "${RAY_PID}" 2>/dev/null || true
      wait "${RAY_PID}" 2>/dev/null || true
      RAY_PID=
   fi
   [[ -z ${RUNTIME_ENV_FILE} ]] || rm -f -- "${RUNTIME_ENV_FILE}"
}

# A stopped job gets SIGTERM and RAY_JOB_STOP_WAIT_TIME_S to end; following its log ends when it has.
stop_job() {
   trap 'exit 143' INT TERM
   echo "stopping Ray job ${JOB_ID}, which has ${RAY_JOB_STOP_WAIT_TIME_S} s to end; a second signal does not wait" >&2
   RAY_ADDRESS="${RAY_ADDRESS}" ray job stop --no-wait "${JOB_ID}" >&2 || true
   [[ -z ${SUBMIT_PID} ]] || wait "${SUBMIT_PID}" || true
   exit 143
}

# submit GPUS NAME=VALUE... -- COMMAND...: run the command as a Ray job with these variables in its environment, follow
# its log, and end with its status
submit() {
   local gpus="$1" environment status=0
   local -a variables=()
   shift
   while [[ $1 != -- ]]; do
      variables+=("$1")
      shift
   done
   shift
   no_proxy="$(no_proxy_with "$(own_hosts)")"
   export no_proxy NO_PROXY="${no_proxy}"
   if [[ ${DRY_RUN:-0} == 1 ]]; then
      environment="$(runtime_env json "${variables[@]}")" || return 2
      quoted ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:${RAY_DASHBOARD_PORT:-8265}}" \
         --runtime-env-json "${environment}" -- "$@"
      return
   fi
   check_ray "$@" || return 2
   export PYTHONUNBUFFERED=1
   trap clean_up EXIT
   trap 'exit 143' INT TERM
   # A file that nobody else can read: a command line is shown to everyone on the host.
   [[ -n ${RUNTIME_ENV_FILE} ]] || RUNTIME_ENV_FILE="$(mktemp)"
   runtime_env yaml "${variables[@]}" >"${RUNTIME_ENV_FILE}" || return 2
   [[ -n ${RAY_ADDRESS:-} ]] || own_ray "${gpus}"
   JOB_ID="fipo-$(date +%Y%m%d-%H%M%S)-$$"
   trap stop_job INT TERM
   ray job submit --address "${RAY_ADDRESS}" --submission-id "${JOB_ID}" --runtime-env "${RUNTIME_ENV_FILE}" -- "$@" &
   SUBMIT_PID=$!
   wait "${SUBMIT_PID}" || status=$?
   return "${status}"
}
