"use strict";
// One response as coloured text, with a strip of F and f over its positions and the numbers of one token. Text, strip and
// numbers follow the same token, wherever it is chosen. Needs data.js, dom.js, charts.js.

const QUANTITIES = {
  f: { label: "f, influence weight", centre: 1, needs: "known" },
  F: { label: "F, Future-KL (nats)", centre: 0, needs: "known" },
  shift: { label: "Δ, shift (nats)", centre: 0, needs: "known" },
  advantages: { label: "A, advantage", centre: 0, needs: null },
  mismatch: { label: "mismatch of the engines (nats)", centre: 0, needs: "mismatch" },
};
const LEVELS = 8; // of colour, on each side of the centre
const MARKS = [
  // bit, CSS class, what it means
  [FATE.CLIPPED_HIGH, "high", "clipped at the upper bound"],
  [FATE.CLIPPED_LOW, "low", "clipped at the lower bound"],
  [FATE.CAPPED, "capped", "capped: A < 0 and ratio above the safety threshold"],
  [FATE.EXCLUDED, "excluded", "excluded: ratio above c, no part in Future-KL"],
  [FATE.NONFINITE, "nonfinite", "Δ is not finite"],
  [FATE.MASKED, "masked", "masked: not trained"],
];
const MARKED = FATE.CLIPPED_HIGH | FATE.CLIPPED_LOW | FATE.CAPPED | FATE.EXCLUDED | FATE.NONFINITE;
const BLOCK_MIN = 200, BLOCK_MAX = 600; // tokens per block; one ends at a line break if it can

class Heatmap {
  /** onMove(token) is called when the reader chooses another token. */
  constructor(label, onMove = () => {}) {
    this.onMove = onMove;
    this.quantity = "f";
    this.current = 0;
    this.version = 0;
    this.canvas = h("canvas", { class: "strip", "aria-hidden": "true" });
    this.text = h("div", {
      class: "tokens", tabindex: 0, role: "group",
      "aria-label": `${label}: tokens. Arrow keys move, m and Shift+M go to the next and previous marked token.`,
    });
    this.readout = h("dl", { class: "readout", "aria-live": "polite" });
    this.legend = h("div", { class: "legend" });
    this.prompt = h("details", { class: "prompt" });
    this.element = h("div", { class: "heatmap" }, this.legend, this.canvas, this.readout, this.prompt, this.text);

    this.text.addEventListener("pointermove", (event) => this.pointAt(event.target));
    this.text.addEventListener("click", (event) => this.pointAt(event.target));
    this.text.addEventListener("keydown", (event) => this.onKey(event));
    this.text.addEventListener("scroll", () => this.scheduleStrip(), { passive: true });
    const fromStrip = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      this.moveTo(Math.min(this.length - 1, Math.floor(part * this.length)), event.buttons > 0 || event.type === "click");
    };
    this.canvas.addEventListener("pointermove", fromStrip);
    this.canvas.addEventListener("click", fromStrip);
    new ResizeObserver(() => this.scheduleStrip()).observe(this.canvas);
    this.watcher = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        target.block.near = isIntersecting;
        if (isIntersecting) this.paint(target.block);
      }
    }, { root: this.text, rootMargin: "400px 0px" });
  }

  /** Show a response. weights: { F, f, fate } over all responses, as recorded or recomputed. */
  show(response, weights, bounds = influenceBounds(response.config)) {
    this.response = response;
    this.length = response.length;
    this.current = Math.min(this.current, Math.max(0, this.length - 1));
    if (this.quantity !== "advantages" && !this.available(this.quantity)) this.quantity = this.available("mismatch") ? "mismatch" : "advantages";
    this.build();
    this.update(weights, bounds);
    this.text.scrollTop = 0;
    this.moveTo(0, false, false);
  }

  available(quantity) {
    const { needs } = QUANTITIES[quantity];
    return needs === null || this.response[needs];
  }

  /** The same response with other weights. */
  update(weights, bounds) {
    this.values = { ...report.arrays, F: weights.F, f: weights.f };
    this.fate = weights.fate;
    this.bounds = bounds;
    this.repaint();
  }

  setQuantity(quantity) {
    this.quantity = quantity;
    this.repaint();
  }

  repaint() {
    this.version++;
    for (const block of this.blocks) if (block.near) this.paint(block);
    this.text.classList.toggle("dropped", this.length > 0 && (this.fate[this.response.start] & FATE.DROPPED) !== 0);
    this.drawLegend();
    this.drawReadout();
    this.scheduleStrip();
  }

  build() {
    const { text, kind } = report.pieces, { tokens, prompts } = report.arrays, { response } = this;
    this.watcher.disconnect();
    this.blocks = [];
    this.spans = new Array(this.length);
    const content = document.createDocumentFragment();
    let block = null;
    for (let i = 0; i < this.length; i++) {
      if (block === null) {
        block = { start: i, version: -1, near: i < BLOCK_MAX, element: h("div", { class: "block" }) };
        block.element.block = block;
        this.blocks.push(block);
        content.append(block.element);
      }
      const piece = tokens[response.start + i];
      const span = document.createElement("span");
      span.textContent = text[piece];
      span.token = i;
      span.special = kind[piece] !== 0;
      this.spans[i] = span;
      block.element.append(span);
      const size = i + 1 - block.start;
      if (i + 1 === this.length || size >= BLOCK_MAX || (size >= BLOCK_MIN && text[piece].endsWith("\n"))) {
        block.stop = i + 1;
        const lines = Math.ceil(block.element.textContent.length / 90) + 1;
        block.element.style.containIntrinsicSize = `auto none auto ${lines * 24}px`;
        block = null;
      }
    }
    this.text.replaceChildren(content.childNodes.length ? content : h("p", { class: "muted" }, "This response is empty."));
    for (const { element } of this.blocks) this.watcher.observe(element);

    const prompt = [];
    for (let t = 0; t < response.prompt; t++) prompt.push(text[prompts[response.promptStart + t]]);
    this.prompt.replaceChildren(h("summary", {}, `Prompt, ${plural(response.prompt, "token")}`),
      h("div", { class: "prompt-text" }, prompt.join("")));
  }

  paint(block) {
    if (block.version === this.version) return;
    block.version = this.version;
    const { start } = this.response, { usable, flags, trained } = report.arrays;
    const values = this.values[this.quantity], { centre } = QUANTITIES[this.quantity], limit = report.limits[this.quantity];
    for (let i = block.start; i < block.stop; i++) {
      const t = start + i, span = this.spans[i];
      let name = i === this.current ? "t current" : "t";
      if (span.special) name += " special";
      if (!(flags[t] & 512)) name += " absent";
      else {
        const part = (values[t] - centre) / limit;
        if (!usable[t]) name += " masked";
        else if (Number.isNaN(part)) name += " unknown";
        else {
          const level = Math.round(LEVELS * Math.min(1, Math.max(-1, part)));
          if (level) name += level > 0 ? ` p${level}` : ` n${-level}`;
        }
        if (trained[t]) for (const [bit, mark] of MARKS) if (this.fate[t] & bit) name += ` ${mark}`;
      }
      if (span.className !== name) span.className = name;
    }
  }

  pointAt(target) {
    if (target.token !== undefined) this.moveTo(target.token, false);
  }

  /** Make token i the current one. */
  moveTo(i, scroll, tell = true) {
    if (!(i >= 0 && i < this.length)) {
      this.drawReadout();
      return;
    }
    this.spans[this.current]?.classList.remove("current");
    this.current = i;
    const span = this.spans[i];
    span.classList.add("current");
    if (scroll) this.reveal(span);
    this.drawReadout();
    this.scheduleStrip();
    if (tell) this.onMove(i);
  }

  /** Scroll the text, and nothing else, so that `span` can be seen. */
  reveal(span) {
    for (let attempt = 0; attempt < 2; attempt++) { // once with estimated heights of blocks, once with their own
      const box = this.text.getBoundingClientRect(), own = span.getBoundingClientRect();
      if (own.top >= box.top + 8 && own.bottom <= box.bottom - 8) return;
      this.text.scrollTop += own.top - box.top - box.height / 2;
    }
  }

  onKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const move = {
      ArrowLeft: () => this.current - 1,
      ArrowRight: () => this.current + 1,
      ArrowUp: () => this.lineAway(-1),
      ArrowDown: () => this.lineAway(1),
      Home: () => 0,
      End: () => this.length - 1,
      m: () => this.nextMark(1),
      M: () => this.nextMark(-1),
    }[event.key];
    if (!move) return;
    event.preventDefault();
    const target = move();
    if (target >= 0 && target < this.length) this.moveTo(target, true);
  }

  /** The token above or below the current one. */
  lineAway(direction) {
    const from = this.spans[this.current].getBoundingClientRect();
    let best = this.current, bestDistance = Infinity, line = null;
    for (let i = this.current + direction; i >= 0 && i < this.length; i += direction) {
      const box = this.spans[i].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < 4) continue;
      if (line === null) line = box.top;
      else if (Math.abs(box.top - line) >= 4) break;
      const distance = Math.abs(box.left - from.left);
      if (distance < bestDistance) [best, bestDistance] = [i, distance];
    }
    return best;
  }

  /** The next token in that direction at which marks begin or change. */
  nextMark(direction) {
    const { start } = this.response, { usable } = report.arrays;
    const marks = (i) => (i >= 0 && usable[start + i] ? this.fate[start + i] & MARKED : 0);
    for (let i = this.current + direction; i >= 0 && i < this.length; i += direction) {
      if (marks(i) && marks(i) !== marks(i - 1)) return i;
    }
    return this.current;
  }

  drawLegend() {
    const { centre } = QUANTITIES[this.quantity], limit = report.limits[this.quantity];
    const cells = [];
    for (let level = -LEVELS; level <= LEVELS; level += 2) {
      const name = level ? (level > 0 ? `p${level}` : `n${-level}`) : "";
      cells.push(h("span", { class: `t cell ${name}` }, number(centre + (limit * level) / LEVELS, 2)));
    }
    let used = 0;
    const { start, stop } = this.response, { trained } = report.arrays;
    for (let t = start; t < stop; t++) used |= trained[t] ? this.fate[t] : FATE.MASKED;
    this.legend.replaceChildren(
      h("span", { class: "scale", role: "img", "aria-label": `Colour scale from ${number(centre - limit)} to ${number(centre + limit)}` }, cells),
      ...MARKS.filter(([bit]) => used & bit).map(([, mark, meaning]) =>
        h("span", { class: "key" }, h("span", { class: `t ${mark}` }, "token"), ` ${meaning}`)),
      used & FATE.DROPPED ? h("span", { class: "key" }, h("span", { class: "t dropped" }), " dropped by the sequence filter: the loss is 0") : "",
    );
  }

  drawReadout() {
    if (!this.length) {
      this.readout.replaceChildren();
      return;
    }
    const i = this.current, t = this.response.start + i, { arrays, pieces } = report;
    const piece = arrays.tokens[t];
    const entries = [["token", `${number(i + 1)} of ${number(this.length)}`], ["text", pieces.text[piece].trimEnd() || "␠"], ["id", String(pieces.id[piece])]];
    if (!(arrays.flags[t] & 512)) entries.push(["", "missing: no file holds it"]);
    else {
      if (this.response.known) {
        entries.push(["Δ (nats)", signed(arrays.shift[t])], ["ratio", number(Math.exp(arrays.shift[t]))],
          ["F (nats)", signed(this.values.F[t])], ["f", number(this.values.f[t], 4)]);
      }
      entries.push(["A", signed(arrays.advantages[t])]);
      if (this.response.mismatch) entries.push(["mismatch (nats)", signed(arrays.mismatch[t])]);
      const fates = MARKS.filter(([bit]) => this.fate[t] & bit).map(([, , meaning]) => meaning.split(":")[0]);
      if (this.fate[t] & FATE.DROPPED) fates.push("dropped");
      entries.push(["fate", fates.join(", ") || "weighted"]);
    }
    this.readout.replaceChildren(...entries.map(([name, value]) =>
      h("div", { class: name === "text" ? "wide" : null }, h("dt", {}, name), h("dd", {}, value))));
  }

  scheduleStrip() {
    this.stripDue ??= requestAnimationFrame(() => {
      this.stripDue = null;
      if (this.response && this.canvas.isConnected) this.drawStrip();
    });
  }

  drawStrip() {
    const { canvas, length } = this, { start } = this.response, ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width || !length) return;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const line = cssVariable("--line"), text = cssVariable("--muted");
    const [from, to] = this.visibleTokens();
    context.fillStyle = cssVariable("--window");
    context.fillRect((from / length) * width, 0, Math.max(2, ((to - from) / length) * width), height);

    const bands = this.response.known ? ["F", "f"] : [this.available("mismatch") ? "mismatch" : "advantages"];
    const bandHeight = height / bands.length, labels = [];
    bands.forEach((name, index) => {
      const values = this.values[name], { centre } = QUANTITIES[name], top = index * bandHeight;
      const limit = name === "f" ? Math.max(this.bounds[1] - 1, 1 - this.bounds[0], 0.01) * 1.1 : this.largest(values, centre);
      labels.push(`${name === "advantages" ? "A" : name}: ${number(centre - limit, 2)} to ${number(centre + limit, 2)}${name === "F" || name === "mismatch" ? " nats" : ""}`);
      const y = (value) => top + bandHeight / 2 - (Math.min(1, Math.max(-1, (value - centre) / limit)) * (bandHeight - 6)) / 2;
      context.strokeStyle = line;
      context.beginPath();
      context.moveTo(0, y(centre));
      context.lineTo(width, y(centre));
      if (index) { context.moveTo(0, top); context.lineTo(width, top); }
      context.stroke();
      for (let column = 0; column < width; column++) { // the range of the tokens under one pixel
        const first = Math.floor((column / width) * length), last = Math.max(first + 1, Math.floor(((column + 1) / width) * length));
        let low = Infinity, high = -Infinity;
        for (let i = first; i < last; i++) {
          const value = values[start + i];
          if (value < low) low = value;
          if (value > high) high = value;
        }
        const zero = y(centre);
        if (high > centre) {
          context.fillStyle = cssColours.above;
          context.fillRect(column, y(high), 1, zero - y(high));
        }
        if (low < centre) {
          context.fillStyle = cssColours.below;
          context.fillRect(column, zero, 1, y(low) - zero);
        }
      }
    });
    context.fillStyle = cssVariable("--text");
    context.fillRect(((this.current + 0.5) / length) * width - 0.75, 0, 1.5, height);
    context.font = "11px system-ui, sans-serif";
    labels.forEach((label, index) => {
      const top = index * bandHeight;
      context.fillStyle = cssVariable("--panel");
      context.fillRect(1, top + 1, context.measureText(label).width + 8, 15);
      context.fillStyle = text;
      context.fillText(label, 5, top + 12);
    });
  }

  largest(values, centre) {
    let size = 1e-3;
    for (let t = this.response.start; t < this.response.stop; t++) {
      const distance = Math.abs(values[t] - centre);
      if (distance > size && distance < Infinity) size = distance;
    }
    return size;
  }

  /** First and last token in the text's window, by the blocks' places. */
  visibleTokens() {
    const top = this.text.scrollTop, bottom = top + this.text.clientHeight;
    let from = null, to = 0;
    for (const { element, start, stop } of this.blocks) {
      const begin = element.offsetTop, size = element.offsetHeight || 1;
      if (begin + size < top || begin > bottom) continue;
      const at = (y) => start + (stop - start) * Math.min(1, Math.max(0, (y - begin) / size));
      from ??= at(top);
      to = at(bottom);
    }
    return [from ?? 0, to];
  }
}

const signed = (value) => (value > 0 ? "+" : "") + number(value, 4);
const cssColours = { above: "", below: "" };

function readCssColours() {
  cssColours.above = cssVariable("--above");
  cssColours.below = cssVariable("--below");
}
