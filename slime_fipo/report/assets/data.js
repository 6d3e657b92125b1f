"use strict";
// Unpacks the page's data block into `report`: what page.py describes, with typed arrays. Needs weights.js.

let report = null;

async function loadReport() {
  const element = document.getElementById("data");
  const text = element.textContent.trim();
  element.textContent = "";
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const headerLength = new DataView(buffer).getUint32(0, true);
  const loaded = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, headerLength)));

  const views = { uint32: Uint32Array, uint16: Uint16Array, float32: Float32Array };
  const arrays = {};
  for (const [name, { type, offset, length }] of Object.entries(loaded.arrays)) {
    arrays[name] = new views[type](buffer, 4 + headerLength + offset, length);
  }
  const count = arrays.flags.length;
  arrays.fate = new Uint8Array(count);
  arrays.trained = new Uint8Array(count); // the loss mask
  arrays.usable = new Uint8Array(count); // trained, present: what averages are over
  for (let t = 0; t < count; t++) {
    const flags = arrays.flags[t];
    arrays.fate[t] = flags & 255;
    arrays.trained[t] = (flags >> 8) & 1;
    arrays.usable[t] = arrays.trained[t] & (flags >> 9);
  }
  loaded.arrays = arrays;

  loaded.offsets = new Uint32Array(loaded.responses.length + 1);
  let promptAt = 0;
  loaded.responses.forEach((response, index) => {
    response.index = index;
    response.start = loaded.offsets[index];
    response.stop = loaded.offsets[index + 1] = response.start + response.length;
    response.promptStart = promptAt;
    promptAt += response.prompt;
    response.whole = true;
    for (let t = response.start; t < response.stop; t++) if (!(arrays.flags[t] & 512)) response.whole = false;
  });
  loaded.limits = colourLimits(loaded);
  report = loaded;
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** What the ends of the colour scale mean, the same for all responses: the 99th percentile of the absolute value. */
function colourLimits({ arrays, responses }) {
  const limits = {};
  for (const name of ["shift", "F", "mismatch", "advantages"]) {
    const sample = [];
    const step = Math.max(1, Math.floor(arrays[name].length / 20000));
    for (let t = 0; t < arrays[name].length; t += step) {
      const size = Math.abs(arrays[name][t]);
      if (arrays.usable[t] && Number.isFinite(size)) sample.push(size);
    }
    sample.sort((a, b) => a - b);
    limits[name] = sample[Math.floor(0.99 * (sample.length - 1))] || 1;
  }
  limits.f = 0.01;
  for (const { config } of responses) {
    const [low, high] = influenceBounds(config);
    limits.f = Math.max(limits.f, config.clip_influence ? Math.max(1 - low, high - 1) : 1);
  }
  return limits;
}

/** The recorded values, in the shape that fipoWeights returns. */
function recordedWeights() {
  return report.arrays;
}

/** Shown text of a response, for searching; kept once made. */
function textOf(response) {
  if (response.text === undefined) {
    const { text } = report.pieces, { tokens, prompts } = report.arrays;
    const parts = [];
    for (let t = 0; t < response.prompt; t++) parts.push(text[prompts[response.promptStart + t]]);
    for (let t = response.start; t < response.stop; t++) parts.push(text[tokens[t]]);
    response.text = parts.join("").toLowerCase();
  }
  return response.text;
}

function rolloutOf(response) {
  return report.rollouts.find((r) => r.run === response.run && r.rollout === response.rollout);
}

/** Responses on the page with the same run, rollout, step and group, in order of position. */
function siblingsOf(response) {
  return report.responses.filter((other) =>
    ["run", "rollout", "step", "group"].every((key) => other[key] === response[key]));
}
