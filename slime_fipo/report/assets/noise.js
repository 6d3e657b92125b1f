"use strict";
// View: does Future-KL follow the policy, or the rollout engine's noise? And what is missing. Needs charts.js, rollout.js.

const VERDICTS = {
  noise: "The weights follow engine noise.",
  mixed: "A large part of the weights is engine noise.",
  drift: "The weights follow the policy's drift.",
  none: "The shift holds no engine mismatch.",
  unknown: "The last step's Future-KL was not recorded, so there is nothing to compare the noise with.",
};

const VERDICT_WORDS = { noise: "noise", mixed: "partly noise", drift: "drift", none: "no mismatch in Δ", unknown: "–" };

const noiseView = {
  title: "Noise",

  render(container) {
    const judged = report.rollouts.filter((r) => r.noise);
    if (!judged.length) {
      container.append(report.rollouts.length
        ? h("p", { class: "empty" }, "These records do not hold the mismatch between trainer and rollout engine: it needs the log-probs of both "
          + "(--get-mismatch-metrics, --use-rollout-logprobs or --use-tis in slime).")
        : noRecords());
      return;
    }
    for (const run of new Set(judged.map((r) => r.run))) {
      const newest = judged.filter((r) => r.run === run).at(-1);
      container.append(verdict(newest));
      if (newest.noise.histogram) container.append(noiseHistogram(newest));
    }
    container.append(h("h2", {}, "All recorded rollouts"), table(
      ["rollout", "mean |mismatch| (nats)", "mean mismatch (nats)", "mean |F| of the mismatch (nats)", "mean |F|, last step (nats)", "ratio", "weights it would clip", "clipped, last step", "verdict"],
      judged.map(({ noise, ...rollout }) => [rolloutName(rollout), number(noise.mismatch, 4), number(noise.bias, 4), number(noise.noise, 4), number(noise.final, 4),
        number(noise.ratio, 2), percent(noise.noise_clipped), percent(noise.final_clipped), VERDICT_WORDS[noise.verdict]])));
  },
};

function noiseHistogram(rollout) {
  const chart = h("div", { class: "chart" }), { histogram } = rollout.noise;
  requestAnimationFrame(() => drawHistogram(chart, "F, Future-KL (nats)", histogram.edges, [
    { label: "mismatch by itself", counts: histogram.noise, colour: "--series-2" },
    { label: "last step", counts: histogram.final, colour: "--series-1" },
  ]));
  return h("section", { class: "card" }, h("h3", {}, `F in ${rolloutName(rollout)}: mismatch by itself, and the last step`), chart);
}

function verdict(rollout) {
  const { noise } = rollout;
  const box = h("section", { class: `verdict ${noise.verdict}` }, h("h2", {}, VERDICTS[noise.verdict]));
  const compared = noise.final === null ? "" : `, ${number(noise.ratio, 2)} times the ${number(noise.final, 4)} of the last step`;
  box.append(h("p", {}, `${rolloutName(rollout)}: trainer and rollout engine differ by ${number(noise.mismatch, 4)} nats a token on average. `
    + `By itself that gives a mean |F| of ${number(noise.noise, 4)} nats${compared}, and would clip ${percent(noise.noise_clipped)} of the weights.`));
  if (noise.verdict === "none") {
    box.append(h("p", {}, "Δ is measured from the trainer's own log-probs, so F is the policy's drift. The numbers say what the rollout engine's log-probs would add."));
  }
  const changes = noise.verdict === "noise" || noise.verdict === "mixed" ? remedies(noise) : oneSided(noise);
  if (changes.length) box.append(h("p", {}, "What to change:"), h("ul", {}, changes.map((change) => h("li", {}, change))));
  return box;
}

function remedies(noise) {
  const gain = (tau) => 1 / Math.sqrt(1 - 2 ** (-2 / tau));
  const half = noise.decay_rate / 4;
  return [
    [h("code", {}, "--fipo-shift-from train"), ": measure Δ from the trainer's log-probs. It costs one forward pass per rollout."],
    [h("code", {}, "LOGPROBS=train"), " in the launch scripts: ratio and shift both from the trainer's log-probs, as in the paper."],
    [`A smaller τ: independent noise σ becomes ${gain(noise.decay_rate).toFixed(1)} σ in F at τ = ${noise.decay_rate}, ${gain(half).toFixed(1)} σ at τ = ${half}. Try it under `, h("a", { href: "#whatif" }, "What if"), "."],
    ...oneSided(noise),
  ];
}

function oneSided(noise) {
  if (Math.abs(noise.bias) < 0.5 * noise.spread || Math.abs(noise.bias) < 0.005) return [];
  return [[`The mismatch is one-sided, ${number(noise.bias, 4)} nats a token on average, which rounding noise is not. A vocabulary that Megatron pads does this: the `
    + "padding rows take part in its softmax and not in the rollout engine's. Set ", h("code", {}, "--make-vocab-size-divisible-by 1"), ", or choose a vocabulary that needs no padding."]];
}

const incompleteView = {
  title: "Incomplete",

  render(container) {
    const runs = report.runs.filter((run) => run.missing.length);
    if (!runs.length) container.append(h("p", { class: "empty" }, "Nothing is missing: every rank, shard and step that the records speak of is here."));
    for (const run of runs) {
      container.append(h("h2", {}, run.name), h("ul", { class: "missing" }, run.missing.map((sentence) => h("li", {}, sentence))));
    }
    if (runs.length) {
      container.append(h("p", { class: "muted" }, "Averages are over the tokens that are here. Responses with missing tokens are left out of What if, because their Future-KL needs every token."));
    }
    if (report.notes.length) container.append(h("h2", {}, "Notes"), h("ul", {}, report.notes.map((note) => h("li", {}, note))));
  },
};
