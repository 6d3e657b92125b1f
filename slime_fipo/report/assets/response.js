"use strict";
// View: one response as a heatmap, its siblings one key away, and the rollout's other recorded step beside it. Needs
// heatmap.js, rollout.js.

const responseView = {
  title: "Response",

  render(container, index = state.response) {
    const response = report.responses[index];
    if (!response) {
      container.append(noRecords());
      return;
    }
    state.response = Number(index);
    const rollout = rolloutOf(response), siblings = siblingsOf(response), place = siblings.indexOf(response);
    const other = counterpart(response);
    const main = new Heatmap("Response", (i) => { if (other?.same) second.moveTo(i, true, false); });
    const second = other?.response ? new Heatmap("The other step") : null;
    const both = [main, second].filter(Boolean);
    const neighbour = (distance, label, key) => {
      const target = siblings[place + distance];
      return h("button", { type: "button", disabled: !target, "data-key": key, "data-focus": key, onclick: () => go("response", target.index) }, label);
    };
    const colour = h("span");
    const drawColour = () => colour.replaceChildren(select("Colour", Object.entries(QUANTITIES)
      .filter(([name]) => main.available(name)).map(([name, { label }]) => [name, label]), main.quantity, (name) => {
      state.quantity = name;
      for (const heatmap of both) if (heatmap.available(name)) heatmap.setQuantity(name);
    }));
    container.append(
      h("div", { class: "controls" },
        select("Response", report.responses.map((r) => [r.index, responseName(r)]), index, (value) => go("response", value)),
        colour,
        h("div", { class: "field" }, h("span", {}, `Group ${response.group}: ${place + 1} of ${siblings.length} here`),
          h("div", { class: "buttons" }, neighbour(-1, "‹ previous (p)", "p"), neighbour(1, "next (n) ›", "n"))),
      ),
      h("p", {}, responseFacts(response)),
    );
    if (second) {
      container.append(h("div", { class: "grid two" },
        h("section", {}, h("h2", {}, stepTitle(rollout, response)), main.element),
        h("section", {}, h("h2", {}, stepTitle(rollout, other.response), other.same ? "" : `: response ${other.response.position} of the same group`), second.element)));
    } else {
      container.append(h("section", {}, h("h2", {}, stepTitle(rollout, response)), main.element), ...stepsBeside(rollout));
    }
    for (const heatmap of both) heatmap.quantity = state.quantity;
    main.show(response, recordedWeights());
    second?.show(other.response, recordedWeights());
    drawColour();
    state.heatmap = main;
  },
};

const responseName = (r) =>
  `${report.runs.length > 1 ? `${report.runs[r.run].name}, ` : ""}rollout ${r.rollout}, step ${r.step}, group ${r.group}, position ${r.position}`;

const stepTitle = (rollout, response) => `Step ${stepName(rollout, response.step)}`;

function rowOf(response) {
  const { rows } = rolloutOf(response).steps.find(({ step }) => step === response.step);
  return rows.find((row) => row.position === response.position);
}

function responseFacts(response) {
  const row = rowOf(response);
  const facts = [["reward", number(row.reward)], ["A", number(row.advantage)], ["tokens", number(row.length)], ["trained", number(row.trained)]];
  if (response.known) {
    facts.push(["mean f", number(row.f, 4)], ["f", `${number(row.f_min)} to ${number(row.f_max)}`], ["mean |F|", `${number(row.future_kl)} nats`],
      ["clipped", percent(row.clipped)], ["excluded", percent(row.excluded)]);
  }
  const shown = facts.flatMap(([name, value]) => [h("span", { class: "fact" }, h("b", {}, name), ` ${value}`)]);
  if (row.dropped) shown.push(h("strong", { class: "tag" }, "dropped by the sequence filter: its loss is 0"));
  if (!response.whole) shown.push(h("strong", { class: "tag" }, `${plural(row.absent, "token")} missing`));
  if (!response.known) shown.push(h("span", { class: "fact" }, "Δ, F and f are not known for this response"));
  return shown;
}

/** The same response at the rollout's other recorded step, or else one of its group. */
function counterpart(response) {
  const others = report.responses.filter((r) => r.run === response.run && r.rollout === response.rollout && r.step !== response.step);
  const same = others.find((r) => r.position === response.position);
  if (same) return { response: same, same: true };
  const sibling = others.find((r) => r.group === response.group);
  return sibling ? { response: sibling, same: false } : null;
}

/** Where first and last step share no group: the distributions of both. */
function stepsBeside(rollout) {
  const steps = rollout.steps.map(({ step }) => step);
  if (steps.length < 2 || !rollout.histograms.future_kl) return [];
  const section = h("section", {}, h("h2", {}, "First and last step of this rollout"),
    h("p", { class: "muted" }, "They trained on different groups, so the distributions over all recorded tokens are compared."));
  const grid = h("div", { class: "grid two" });
  for (const quantity of ["future_kl", "influence"]) {
    const histogram = rollout.histograms[quantity];
    if (!histogram) continue;
    const chart = h("div", { class: "chart" });
    grid.append(h("div", { class: "card" }, h("h3", {}, QUANTITY_TITLES[quantity]), chart));
    const series = [steps[0], steps[steps.length - 1]].map((step, i) => {
      const counts = new Array(histogram.edges.length - 1).fill(0);
      for (const part of Object.values(histogram.steps[step])) part.counts.forEach((count, bin) => { counts[bin] += count; });
      return { label: `step ${stepName(rollout, step)}`, counts, colour: i ? "--series-2" : "--muted" };
    });
    requestAnimationFrame(() => drawHistogram(chart, QUANTITY_TITLES[quantity], histogram.edges, series));
  }
  section.append(grid);
  return [section];
}
