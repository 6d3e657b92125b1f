"use strict";
// View: one rollout's responses as a table, and histograms of Δ, F and f by the advantage's sign. Needs charts.js, data.js.

const SIGN_COLOURS = { "A > 0": "--above", "A < 0": "--below", "A = 0": "--muted" };
const COLUMNS = [
  ["position", "position", number],
  ["group", "group", number],
  ["step", "step", number],
  ["reward", "reward", number],
  ["advantage", "A", number],
  ["length", "tokens", number],
  ["f", "mean f", (value) => number(value, 4)],
  ["f_min", "min f", number],
  ["f_max", "max f", number],
  ["future_kl", "mean |F| (nats)", number],
  ["clipped", "clipped", percent],
  ["capped", "capped", percent],
  ["excluded", "excluded", percent],
  ["nonfinite", "not finite", number],
  ["dropped", "dropped", (value) => (value ? "dropped" : "")],
];
const tableState = { sort: "group", descending: false, search: "", step: "all", group: "all" };

const rolloutView = {
  title: "Rollout",

  render(container, index = report.rollouts.length - 1) {
    const rollout = report.rollouts[index];
    if (!rollout) {
      container.append(noRecords());
      return;
    }
    state.rollout = Number(index);
    const rows = rollout.steps.flatMap(({ step, rows }) => rows.map((row) => ({ ...row, step })));
    const groups = [...new Set(rows.map((row) => row.group))].sort((a, b) => a - b);
    if (!groups.some((group) => String(group) === tableState.group)) tableState.group = "all";
    if (!rollout.steps.some(({ step }) => String(step) === tableState.step)) tableState.step = "all";

    const body = h("tbody"), head = h("tr"), count = h("p", { class: "muted", "aria-live": "polite" });
    const refresh = () => fillTable(rollout, rows, head, body, count, refresh);
    const set = (key) => (value) => { tableState[key] = value; refresh(); };
    container.append(
      h("div", { class: "controls" },
        select("Rollout", report.rollouts.map((r, i) => [i, rolloutName(r)]), index, (value) => go("rollout", value)),
        select("Step", [["all", "all recorded"], ...rollout.steps.map(({ step }) => [step, stepName(rollout, step)])], tableState.step, set("step")),
        select("Group", [["all", "all"], ...groups.map((group) => [group, String(group)])], tableState.group, set("group")),
        h("label", { class: "field grow" }, h("span", {}, "Find in the text"),
          h("input", { type: "search", value: tableState.search, placeholder: "words of a prompt or response", oninput: (event) => set("search")(event.target.value) })),
      ),
      h("p", {}, rolloutFacts(rollout, rows)),
      count,
      h("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Responses of the rollout" },
        h("table", { class: "responses" }, h("thead", {}, head), body)),
      h("h2", {}, "Distributions over recorded tokens, by the advantage's sign"),
      h("div", { class: "grid three" }, ["shift", "future_kl", "influence"].map((quantity) => distribution(rollout, quantity))),
    );
    refresh();
  },
};

const rolloutName = (r) => (report.runs.length > 1 ? `${report.runs[r.run].name}, ` : "") + `rollout ${r.rollout}`;

function stepName({ steps_per_rollout: steps }, step) {
  if (step === steps - 1) return `${step} (last of ${steps})`;
  return step === 0 ? `0 (first of ${steps})` : `${step} (of ${steps})`;
}

function rolloutFacts(rollout, rows) {
  const parts = [`${plural(rows.length, "response")} recorded`];
  if (rollout.samples) parts[0] += ` of the rollout's ${number(rollout.samples)}`;
  parts.push(!rollout.histograms.shift ? "shift not known" : `shift from the ${rollout.shift_from === "rollout" ? "rollout engine's" : "trainer's"} log-probs`);
  parts.push(`written by ${rollout.source}`);
  return `${parts.join("; ")}.`;
}

function fillTable(rollout, rows, head, body, count, refresh) {
  const search = tableState.search.trim().toLowerCase();
  const shown = rows.filter((row) =>
    (tableState.step === "all" || String(row.step) === tableState.step)
    && (tableState.group === "all" || String(row.group) === tableState.group)
    && (search === "" || (row.page >= 0 && textOf(report.responses[row.page]).includes(search))));
  const key = tableState.sort, sign = tableState.descending ? -1 : 1;
  const rank = (value) => (value === null || value === undefined ? -Infinity : Number(value));
  shown.sort((a, b) => sign * (rank(a[key]) - rank(b[key])) || a.group - b.group || a.position - b.position || a.step - b.step);

  head.replaceChildren(...COLUMNS.map(([name, label]) => {
    const sorted = name === key;
    const sort = () => {
      tableState.descending = sorted ? !tableState.descending : !["position", "group", "step"].includes(name);
      tableState.sort = name;
      refresh();
      head.querySelector(`[data-name="${name}"]`).focus();
    };
    return h("th", { scope: "col", "aria-sort": sorted ? (tableState.descending ? "descending" : "ascending") : "none" },
      h("button", { type: "button", class: "plain", "data-name": name, onclick: sort }, label, sorted ? (tableState.descending ? " ▾" : " ▴") : ""));
  }));
  let before = null;
  body.replaceChildren(...shown.map((row) => {
    const newGroup = key === "group" && before !== null && before !== row.group;
    before = row.group;
    const cells = COLUMNS.map(([name, , format]) => h("td", {}, format(row[name])));
    if (row.page >= 0) cells[0].replaceChildren(h("a", { href: `#response/${row.page}`, "aria-label": `Open response ${row.position}` }, String(row.position)));
    if (row.absent) cells[5].append(` (${number(row.absent)} missing)`);
    return h("tr", {
      class: [newGroup ? "new-group" : "", row.page >= 0 ? "open" : ""].join(" ").trim() || null,
      onclick: row.page >= 0 ? (event) => { if (!event.target.closest("a")) go("response", row.page); } : () => {},
    }, cells);
  }));
  const openable = shown.filter((row) => row.page >= 0).length;
  count.textContent = `${plural(shown.length, "response")} shown; ${openable} can be opened (a linked position).`
    + (search && openable < rows.length ? " Text is only searched where it is on this page." : "");
}

const QUANTITY_TITLES = { shift: "Δ, shift (nats)", future_kl: "F, Future-KL (nats)", influence: "f, influence weight" };

function distribution(rollout, quantity) {
  const box = h("section", { class: "card" }, h("h3", {}, QUANTITY_TITLES[quantity]));
  const histogram = rollout.histograms[quantity];
  if (!histogram) {
    box.append(h("p", { class: "muted" }, "Not known: these records hold no shift."));
    return box;
  }
  const chart = h("div", { class: "chart" });
  const numbers = h("div");
  const draw = (step) => {
    const bySign = histogram.steps[step];
    drawHistogram(chart, QUANTITY_TITLES[quantity], histogram.edges,
      Object.entries(bySign).map(([sign, { counts }]) => ({ label: sign, counts, colour: SIGN_COLOURS[sign] })));
    numbers.replaceChildren(table(["", ...report.percentiles.map((p) => `p${p}`), "tokens"],
      Object.entries(bySign).map(([sign, { percentiles, tokens }]) => [sign, ...percentiles.map((value) => number(value)), number(tokens)])));
  };
  const steps = Object.keys(histogram.steps).map(Number);
  const last = steps[steps.length - 1];
  box.append(select("Step", steps.map((step) => [step, stepName(rollout, step)]), last, draw), chart, numbers);
  requestAnimationFrame(() => draw(last));
  return box;
}

function noRecords() {
  return h("p", { class: "empty" }, "No token records were found in these paths. Record them with --fipo-record DIR in a launch "
    + "script (the embedded engine has the same flags), and give that folder to slime-fipo report.");
}
