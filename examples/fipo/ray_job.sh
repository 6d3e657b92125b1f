# shellcheck shell=bash
# Submits a command as a Ray job and follows it. Sourced by every launch script here; knows nothing about training.
#
# Read from the environment:
#   RAY_ADDRESS      http://HOST:PORT of a cluster's job API (its dashboard). Empty: start a Ray of our own on this node
#                    and stop it, and nothing else, at the end. Other Rays on the host are left alone.
#   RAY_PORT, RAY_DASHBOARD_PORT, RAY_AGENT_PORT, RAY_CLIENT_PORT    ports of a Ray of our own
#   RAY_JOB_STOP_WAIT_TIME_S    seconds that a stopped job may take to end by itself (Ray's own variable; 60)
#   DRY_RUN=1        print the command and do nothing

RAY_PID=
SUBMIT_PID=
JOB_ID=
RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-60}"

# quoted WORD...: the words as one line that a shell reads back as the same words
quoted() {
   local line
   printf -v line '%q ' "$@"
   printf '%s\n' "${line% }"
}

# env_json NAME=VALUE...: Ray's runtime environment. Ray's job supervisor, which stops a job, runs in it too.
env_json() {
   python3 -c 'import json, sys; print(json.dumps({"env_vars": dict(a.split("=", 1) for a in sys.argv[1:])}))' \
      "$@" "RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S}"
}

# check_quoting WORD...: older Rays' `ray job submit` joins the words by Windows' rules and hands the line to sh
check_quoting() {
   python3 - "$@" <<'EOF'
import re
import sys

from ray.dashboard.modules.job import cli

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
   RAY_AGENT_PORT="${RAY_AGENT_PORT:-52365}" RAY_CLIENT_PORT="${RAY_CLIENT_PORT:-10001}"
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

stop_own_ray() {
   if [[ -n ${RAY_PID} ]]; then
      kill -TERM "${RAY_PID}" 2>/dev/null || true
      wait "${RAY_PID}" 2>/dev/null || true
      RAY_PID=
   fi
}

# A stopped job gets SIGTERM and RAY_JOB_STOP_WAIT_TIME_S to end; following its log ends when it has.
stop_job() {
   trap 'exit 143' INT TERM
   echo "stopping Ray job ${JOB_ID}, which has ${RAY_JOB_STOP_WAIT_TIME_S} s to end; a second signal does not wait" >&2
   RAY_ADDRESS="${RAY_ADDRESS}" ray job stop --no-wait "${JOB_ID}" >&2 || true
   [[ -z ${SUBMIT_PID} ]] || wait "${SUBMIT_PID}" || true
   exit 143
}

# submit GPUS ENV_JSON COMMAND...: run the command as a Ray job, follow its log, and end with its status
submit() {
   local gpus="$1" environment="$2" status=0
   shift 2
   if [[ ${DRY_RUN:-0} == 1 ]]; then
      quoted ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:${RAY_DASHBOARD_PORT:-8265}}" \
         --runtime-env-json "${environment}" -- "$@"
      return
   fi
   check_quoting "$@"
   export PYTHONUNBUFFERED=1
   trap stop_own_ray EXIT
   trap 'exit 143' INT TERM
   [[ -n ${RAY_ADDRESS:-} ]] || own_ray "${gpus}"
   JOB_ID="fipo-$(date +%Y%m%d-%H%M%S)-$$"
   trap stop_job INT TERM
   ray job submit --address "${RAY_ADDRESS}" --submission-id "${JOB_ID}" --runtime-env-json "${environment}" -- "$@" &
   SUBMIT_PID=$!
   wait "${SUBMIT_PID}" || status=$?
   return "${status}"
}
