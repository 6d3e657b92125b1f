"use strict";
// Starts the page: unpacks the data, and shows the view that the address names (#view/argument). Needs everything else.

const views = { trend: trendView, rollout: rolloutView, response: responseView, whatif: whatIfView, noise: noiseView, incomplete: incompleteView };
const state = { rollout: undefined, response: 0, quantity: "f", heatmap: null };

function go(view, argument) {
  const target = argument === undefined ? `#${view}` : `#${view}/${argument}`;
  if (location.hash === target) showView();
  else location.hash = target;
}

function showView() {
  const [name, argument] = location.hash.slice(1).split("/");
  const view = views[name] ?? trendView;
  for (const link of document.querySelectorAll("nav a")) {
    if (views[link.hash.slice(1)] === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const container = document.getElementById("view");
  const focused = container.contains(document.activeElement) ? document.activeElement : null;
  state.heatmap = null;
  container.replaceChildren();
  dropCharts();
  container.append(h("h1", { tabindex: -1 }, view.title));
  view.render(container, argument ?? (view === rolloutView ? state.rollout : undefined));
  if (focused) keepFocus(container, focused);
}

/** What had the focus is gone: give it to the same control of the new view, else to the response's text or the heading. */
function keepFocus(container, { dataset: { focus } }) {
  const same = focus && container.querySelector(`[data-focus="${CSS.escape(focus)}"]:not(:disabled)`);
  (same || state.heatmap?.text || container.querySelector("h1")).focus({ preventScroll: true });
}

function buildFrame() {
  const missing = report.runs.reduce((sum, run) => sum + run.missing.length, 0);
  document.getElementById("views").replaceChildren(...Object.entries(views).map(([name, view]) => h("a", { href: `#${name}` }, view.title,
    view === incompleteView && missing ? h("span", { class: "badge" }, String(missing)) : null)));
  document.getElementById("runs").textContent = report.runs.map((run) => run.name).join(", ");
  document.getElementById("selection").textContent = report.selection;
  const warnings = report.notes.slice();
  if (missing) warnings.push(`${plural(missing, "thing")} missing; see Incomplete.`);
  document.getElementById("warnings").replaceChildren(...warnings.map((text) => h("p", {}, text)));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, select, textarea")) return;
  if (event.key === "n" || event.key === "p") {
    document.querySelector(`#view [data-key="${event.key}"]:not(:disabled)`)?.click();
  }
});

/** What the page opens with: the newest rollout, and of its last step the response with the largest sum of |f − 1|. */
function openMostExtreme() {
  if (!report.rollouts.length) return;
  state.rollout = report.rollouts.length - 1;
  const rows = report.rollouts[state.rollout].steps.at(-1).rows.filter((row) => row.page >= 0 && !row.dropped);
  rows.sort((a, b) => (b.deviation ?? 0) * b.trained - (a.deviation ?? 0) * a.trained);
  if (rows.length) state.response = rows[0].page;
}

async function start() {
  const status = document.getElementById("status");
  if (typeof DecompressionStream === "undefined") {
    status.textContent = "This browser is too old for the page: it needs Chrome 80, Firefox 113 or Safari 16.4.";
    return;
  }
  await loadReport();
  readCssColours();
  buildFrame();
  addEventListener("hashchange", showView);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readCssColours();
    redrawCharts();
    state.heatmap?.scheduleStrip();
  });
  openMostExtreme();
  showView();
  status.remove();
  // Set once the first view has been painted; how long that took since the page was asked for, in milliseconds.
  requestAnimationFrame(() => setTimeout(() => { document.documentElement.dataset.ready = performance.now().toFixed(1); }));
}

start().catch((error) => {
  document.getElementById("status").textContent = `The page's data cannot be read: ${error.message}`;
  throw error;
});
