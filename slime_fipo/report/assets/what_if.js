"use strict";
// View: other settings on the same records. F and f of every response on the page are computed again, before (each with its
// recorded settings) and after (with the controls'). Needs weights.js, heatmap.js, charts.js.

const whatIf = { config: null, before: null, after: null };
const WHAT_IF_BINS = 80;

/** Compute F and f of all responses: config, or null for each response's own recorded settings. */
function recompute(config, out = null) {
  const { shift, advantages, trained } = report.arrays;
  if (config) return fipoWeights(shift, advantages, trained, report.offsets, config, 0, report.responses.length, out);
  for (const { index, config: own } of report.responses) {
    out = fipoWeights(shift, advantages, trained, report.offsets, own, index, index + 1, out);
  }
  return out;
}

/** Responses that what-if can speak of: Δ is known, and no token is missing. */
const comparable = () => report.responses.filter((r) => r.known && r.whole);

function summarise(weights, edges) {
  const { usable } = report.arrays, { F, f, fate } = weights;
  const sums = { tokens: 0, f: 0, deviation: 0, F: 0, high: 0, low: 0, capped: 0, excluded: 0, dropped: 0 };
  const bins = { F: new Uint32Array(WHAT_IF_BINS), f: new Uint32Array(WHAT_IF_BINS) };
  const scale = { F: WHAT_IF_BINS / (edges.F[1] - edges.F[0]), f: WHAT_IF_BINS / (edges.f[1] - edges.f[0]) };
  for (const { start, stop } of comparable()) {
    if (stop > start && fate[start] & FATE.DROPPED) sums.dropped++;
    for (let t = start; t < stop; t++) {
      if (!usable[t]) continue;
      const flags = fate[t];
      sums.tokens++;
      sums.f += f[t];
      sums.deviation += Math.abs(f[t] - 1);
      sums.F += Math.abs(F[t]);
      if (flags & FATE.CLIPPED_HIGH) sums.high++;
      if (flags & FATE.CLIPPED_LOW) sums.low++;
      if (flags & FATE.CAPPED) sums.capped++;
      if (flags & FATE.EXCLUDED) sums.excluded++;
      bins.F[Math.max(0, Math.min(WHAT_IF_BINS - 1, Math.floor((F[t] - edges.F[0]) * scale.F)))]++;
      bins.f[Math.max(0, Math.min(WHAT_IF_BINS - 1, Math.floor((f[t] - edges.f[0]) * scale.f)))]++;
    }
  }
  return { sums, bins };
}

/** Share of trained tokens whose f, or whose being dropped, is another. */
function shareChanged(before, after) {
  const { usable } = report.arrays;
  let changed = 0, tokens = 0;
  for (const { start, stop } of comparable()) {
    for (let t = start; t < stop; t++) {
      if (!usable[t]) continue;
      tokens++;
      if (Math.abs(after.f[t] - before.f[t]) > 1e-9 || (after.fate[t] ^ before.fate[t]) & FATE.DROPPED) changed++;
    }
  }
  return tokens ? changed / tokens : 0;
}

const whatIfView = {
  title: "What if",

  render(container) {
    if (!comparable().length) {
      container.append(report.responses.length
        ? h("p", { class: "empty" }, "No response on this page has a known shift for every token, so nothing can be computed again.")
        : noRecords());
      return;
    }
    let response = report.responses[state.response];
    if (!response.known) response = comparable()[0];
    whatIf.before ??= recompute(null);
    whatIf.config ??= { ...response.config };
    whatIf.after ??= recompute(whatIf.config);

    const outputs = { table: h("div"), F: h("div", { class: "chart" }), f: h("div", { class: "chart" }), flags: h("pre", { class: "flags", tabindex: 0 }) };
    const heatmap = new Heatmap("What if");
    const update = () => {
      whatIf.after = recompute(whatIf.config, whatIf.after);
      showWhatIf(outputs);
      heatmap.update(whatIf.after, influenceBounds(whatIf.config));
    };
    whatIf.apply = (config) => { Object.assign(whatIf.config, config); update(); };
    const controls = h("fieldset", { class: "settings" });
    const draw = () => controls.replaceChildren(h("legend", {}, "Settings"), ...settingControls(update),
      h("button", { type: "button", onclick: () => { whatIf.config = { ...response.config }; draw(); update(); } }, "back to the recorded settings"));
    draw();

    const copied = h("span", { class: "muted", "aria-live": "polite" });
    container.append(
      h("p", { class: "muted" }, whatIfScope()),
      h("div", { class: "grid side" },
        controls,
        h("div", {},
          h("div", { class: "grid three" },
            outputs.table,
            h("section", { class: "card" }, h("h3", {}, QUANTITY_TITLES.influence), outputs.f),
            h("section", { class: "card" }, h("h3", {}, QUANTITY_TITLES.future_kl), outputs.F)),
          h("h2", {}, "The open response with these settings"),
          h("div", { class: "controls" },
            select("Response", comparable().map((r) => [r.index, responseName(r)]), response.index, (value) => {
              state.response = Number(value);
              heatmap.show(report.responses[value], whatIf.after, influenceBounds(whatIf.config));
            }),
            select("Colour", Object.entries(QUANTITIES).filter(([, { needs }]) => needs === "known").map(([name, { label }]) => [name, label]),
              "f", (name) => heatmap.setQuantity(name))),
          heatmap.element,
          h("h2", {}, "Flags for a launch script"),
          outputs.flags,
          h("p", {}, h("button", { type: "button", onclick: () => copyText(outputs.flags, copied) }, "copy"), " ", copied))),
    );
    heatmap.show(response, whatIf.after, influenceBounds(whatIf.config));
    showWhatIf(outputs);
    state.heatmap = heatmap;
  },
};

function whatIfScope() {
  const left = report.responses.length - comparable().length;
  const differing = new Set(report.responses.map((r) => JSON.stringify(r.config))).size > 1;
  return `Computed in this page, in double precision, over ${plural(comparable().length, "response")}. Before: `
    + (differing ? "each response with the settings it was recorded with." : "the recorded settings.")
    + (left ? ` ${plural(left, "response")} with an unknown shift or missing tokens left out.` : "")
    + " The shifts are what this run's policy did; with other weights the next steps would have moved it differently.";
}

function showWhatIf(outputs) {
  const { config, before, after } = whatIf;
  const bounds = [config, ...report.responses.map((r) => r.config)].map(influenceBounds);
  const reach = 2.5 * report.limits.F;
  const edges = {
    F: [-reach, reach],
    f: [Math.min(...bounds.map(([low]) => low)) - 0.02, Math.max(...bounds.map(([, high]) => high)) + 0.02],
  };
  const [a, b] = [before, after].map((weights) => summarise(weights, edges));
  const rows = [
    ["mean f", "f", (value, n) => number(value / n, 4)],
    ["mean |f − 1|", "deviation", (value, n) => number(value / n, 4)],
    ["mean |F| (nats)", "F", (value, n) => number(value / n, 4)],
    ["clipped high", "high", (value, n) => percent(value / n)],
    ["clipped low", "low", (value, n) => percent(value / n)],
    ["capped (safety)", "capped", (value, n) => percent(value / n)],
    ["excluded (ratio > c)", "excluded", (value, n) => percent(value / n)],
    ["responses dropped", "dropped", (value) => number(value)],
  ].map(([label, key, format]) => [label, format(a.sums[key], a.sums.tokens || 1), format(b.sums[key], b.sums.tokens || 1)]);
  rows.push(["weights that change", "", percent(shareChanged(before, after))]);
  outputs.table.replaceChildren(table(["", "before", "after"], rows));
  for (const name of ["f", "F"]) {
    const all = Array.from({ length: WHAT_IF_BINS + 1 }, (_, i) => edges[name][0] + ((edges[name][1] - edges[name][0]) * i) / WHAT_IF_BINS);
    drawHistogram(outputs[name], QUANTITY_TITLES[name === "f" ? "influence" : "future_kl"], all, [
      { label: "before", counts: [...a.bins[name]], colour: "--muted" },
      { label: "after", counts: [...b.bins[name]], colour: "--series-2" },
    ]);
  }
  outputs.flags.textContent = launchFlags(config).join(" \\\n");
}

/** The flags that give exactly these settings, whatever preset stands beside them. Flags without effect are refused. */
function launchFlags(config) {
  const orNone = (value) => (value === null ? "none" : String(value));
  const flags = [`--fipo-decay-rate ${config.decay_rate}`];
  if (!config.clip_influence) flags.push("--fipo-unclipped");
  else {
    flags.push(`--fipo-clip-ratio-high ${config.clip_ratio_high}`);
    if (config.clip_high_only) flags.push("--fipo-clip-high-only");
    else flags.push(`--fipo-clip-ratio-low ${config.clip_ratio_low}`, "--no-fipo-clip-high-only");
  }
  flags.push(`--fipo-safety-thresh ${orNone(config.safety_thresh)}`, `--fipo-dual-clip-c ${orNone(config.dual_clip_c)}`);
  if (config.dual_clip_c !== null) flags.push(`--fipo-max-dual-clipped-tokens ${orNone(config.max_dual_clipped_tokens)}`);
  flags.push(`--fipo-decay-over ${config.decay_over}`);
  return flags;
}

// Field, label, limits of the input, whether it can be off, and the value it gets when it is turned on.
const NUMBER_SETTINGS = [
  ["clip_ratio_low", "clip low, ε", { min: 0, max: 0.99, step: 0.05 }, null],
  ["clip_ratio_high", "clip high, ε", { min: 0, max: 100, step: 0.05 }, null],
  ["safety_thresh", "safety threshold s", { min: 0.01, max: 1e6, step: 0.5 }, 10],
  ["dual_clip_c", "dual clip c", { min: 1.01, max: 1e6, step: 0.5 }, 10],
  ["max_dual_clipped_tokens", "sequence filter: dual-clipped tokens allowed", { min: 0, max: 1e6, step: 1 }, 1],
];

function settingControls(update) {
  const { config } = whatIf;
  const slider = h("input", { type: "range", min: 0, max: 10, step: 0.125, value: Math.log2(config.decay_rate), "aria-label": "τ, on a logarithmic scale",
    oninput: (event) => {
      config.decay_rate = Number((2 ** event.target.value).toPrecision(3));
      exact.value = config.decay_rate;
      exact.removeAttribute("aria-invalid");
      update();
    } });
  const exact = numberInput("decay_rate", { min: 0.001, max: 1e6, step: "any" }, () => { slider.value = Math.log2(config.decay_rate); update(); });
  return [
    h("label", { class: "setting" }, h("span", {}, "τ, half-life in tokens"), exact),
    slider,
    ...NUMBER_SETTINGS.map(([name, label, limits, whenOn]) => {
      const input = numberInput(name, limits, update);
      if (whenOn === null) return h("label", { class: "setting" }, h("span", {}, label), input);
      input.disabled = config[name] === null;
      const toggle = h("input", { type: "checkbox", checked: config[name] !== null, "aria-label": `${label}: on`, onchange: (event) => {
        config[name] = event.target.checked ? Number(input.value) || whenOn : null;
        input.value = config[name] ?? "";
        input.disabled = !event.target.checked;
        update();
      } });
      return h("div", { class: "setting" }, h("label", {}, toggle, ` ${label}`), h("label", {}, h("span", { class: "hidden" }, label), input));
    }),
    checkbox("clip_high_only", "high only: f is at least 1", update),
    checkbox("clip_influence", "clip f (off: [0, 10])", update),
    h("label", { class: "setting" }, h("span", {}, "decay over"),
      h("select", { onchange: (event) => { config.decay_over = event.target.value; update(); } },
        ["positions", "trained_tokens"].map((value) => h("option", { value, selected: config.decay_over === value }, value.replace("_", " "))))),
  ];
}

function numberInput(name, { min, max, step }, update) {
  return h("input", { type: "number", min, max, step, value: whatIf.config[name] ?? "", oninput: (event) => {
    const value = event.target.valueAsNumber;
    const good = value >= min && value <= max && (name !== "max_dual_clipped_tokens" || Number.isInteger(value));
    event.target.toggleAttribute("aria-invalid", !good);
    event.target.title = good ? "" : `a number from ${min} to ${max}`;
    if (good) {
      whatIf.config[name] = value;
      update();
    }
  } });
}

function checkbox(name, label, update) {
  return h("label", { class: "setting" }, h("span", {}, label),
    h("input", { type: "checkbox", checked: whatIf.config[name], onchange: (event) => { whatIf.config[name] = event.target.checked; update(); } }));
}

async function copyText(element, status) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    status.textContent = "copied";
  } catch { // not allowed from this file: select it, so that the reader's own copy works
    getSelection().selectAllChildren(element);
    status.textContent = "selected; copy with Ctrl+C";
  }
}
