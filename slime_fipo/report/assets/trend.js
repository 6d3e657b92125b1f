"use strict";
// View: the runs' numbers over rollouts, one shared axis; a click opens a rollout. Needs charts.js, data.js.

const trendView = {
  title: "Trend",

  render(container) {
    const titles = report.runs[0].panels.map((panel) => panel.title)
      .filter((title) => report.runs.some((run) => seriesOf(run, title).length));
    if (!titles.length) {
      container.append(h("p", { class: "empty" }, "No metrics and no token records over rollouts were found in these paths."));
      return;
    }
    const chart = h("div", { class: "chart", role: "img", "aria-label": `Over rollouts: ${titles.join("; ")}. The numbers are in the table below.` });
    container.append(h("p", { class: "muted" }, "Drag to zoom, double-click to go back.",
      report.rollouts.length ? " Click a rollout to open it; dotted lines mark those with token records." : ""));
    container.append(...rolloutLinks(), chart, trendNumbers(titles));
    drawChart(chart, () => trendFigure(titles, chart.clientWidth));
    chart.on("plotly_click", ({ points }) => openNearest(points[0].x, points[0].data.meta));
  },
};

const seriesOf = (run, title) => run.panels.find((panel) => panel.title === title).series;

function trendFigure(titles, width) {
  const narrow = width < 600, several = report.runs.length > 1;
  // Above each plot its title and legend; where they do not fit on one line, the title above a legend of a line per entry.
  const headers = titles.map((title, index) => {
    const names = legendNames(title, index), room = width - 72 - 8 * title.length;
    const oneLine = !narrow && names.reduce((sum, name) => sum + 50 + 6.5 * name.length, 0) < room;
    return { oneLine, lines: names.length, size: oneLine || !names.length ? 44 : 40 + LEGEND_LINE * names.length };
  });
  const margin = { l: 56, r: 16, t: 4, b: 44 };
  const inner = titles.length * PLOT_HEIGHT + headers.reduce((sum, { size }) => sum + size, 0), height = inner + margin.t + margin.b;
  const few = report.runs.every((run) => titles.every((title) => seriesOf(run, title).every(({ x }) => x.every((rollout) => rollout <= 10))));
  let top = 1;
  const layout = {
    height, hovermode: "x", hoversubplots: "axis", annotations: [], shapes: [], dragmode: "zoom",
    margin,
    xaxis: { title: { text: "rollout" }, anchor: titles.length > 1 ? `y${titles.length}` : "y", domain: [0, 1], ...(few ? { dtick: 1 } : {}) },
  };
  const traces = [];
  titles.forEach((title, index) => {
    const suffix = index ? index + 1 : "", { oneLine, lines, size } = headers[index];
    top -= size / inner;
    const bottom = Math.max(0, top - PLOT_HEIGHT / inner);
    layout[`yaxis${suffix}`] = { domain: [bottom, top], fixedrange: true, nticks: 5 };
    layout[`legend${suffix}`] = { orientation: oneLine ? "h" : "v", x: 1, xanchor: "right", y: top, yanchor: "bottom", font: { size: 11 }, bgcolor: "transparent" };
    layout.annotations.push({
      text: `<b>${title}</b>`, x: 0, xref: "paper", xanchor: "left", y: top, yref: "paper", yanchor: "bottom",
      yshift: oneLine ? 3 : 3 + LEGEND_LINE * lines, showarrow: false,
    });
    top = bottom;
    let colour = 0;
    report.runs.forEach((run, runIndex) => {
      for (const { label, x, y } of seriesOf(run, title)) {
        const few = x.length < 40;
        traces.push({
          type: "scatter", mode: few ? "lines+markers" : "lines", x, y, meta: runIndex, xaxis: "x", yaxis: `y${suffix}`,
          legend: `legend${suffix}`, name: seriesName(run, label), connectgaps: true,
          line: { color: seriesColour(several ? runIndex : colour), width: 1.8, dash: several && colour % 2 ? "dot" : "solid" },
          marker: { size: 5, symbol: colour % 2 ? "square" : "circle" }, showlegend: inLegend(run, title, index),
          hovertemplate: "%{y:.4g}",
        });
        colour++;
      }
    });
  });
  for (const rollout of new Set(report.rollouts.map((r) => r.rollout))) {
    titles.forEach((_, index) => layout.shapes.push({
      type: "line", x0: rollout, x1: rollout, xref: "x", y0: 0, y1: 1, yref: `y${index ? index + 1 : ""} domain`, layer: "below",
      line: { color: cssVariable("--muted"), width: 1, dash: "dot" },
    }));
  }
  return [traces, layout];
}

const PLOT_HEIGHT = 124, LEGEND_LINE = 19; // pixels
const seriesName = (run, label) => (report.runs.length > 1 ? `${plain(run.name)}: ${plain(label)}` : plain(label));

/** A panel of one line needs no legend, but for the first panel, which says what the colours of several runs mean. */
function inLegend(run, title, index) {
  return (report.runs.length > 1 && index === 0) || seriesOf(run, title).length > 1;
}

function legendNames(title, index) {
  return report.runs.flatMap((run) => (inLegend(run, title, index) ? seriesOf(run, title).map(({ label }) => seriesName(run, label)) : []));
}

/** Plotly reads a few HTML tags in names; a run's name is only text. */
function plain(text) {
  return text.replace(/[<>&]/g, (character) => ({ "<": "‹", ">": "›", "&": "＆" })[character]);
}

function openNearest(x, run) {
  const known = report.rollouts.map((r, index) => ({ ...r, index })).filter((r) => r.run === run);
  if (!known.length) return;
  const nearest = known.reduce((best, r) => (Math.abs(r.rollout - x) < Math.abs(best.rollout - x) ? r : best));
  go("rollout", nearest.index);
}

function rolloutLinks() {
  if (!report.rollouts.length) return [];
  return [h("p", { class: "links" }, "Recorded rollouts: ", report.rollouts.map((r, index) =>
    h("a", { href: `#rollout/${index}` }, report.runs.length > 1 ? `${report.runs[r.run].name}: ${r.rollout}` : String(r.rollout))))];
}

function trendNumbers(titles) {
  const blocks = report.runs.map((run) => {
    const series = titles.flatMap((title) => seriesOf(run, title).map((line) => [title, line]));
    const rollouts = [...new Set(series.flatMap(([, line]) => line.x))].sort((a, b) => a - b);
    const columns = ["rollout", ...series.map(([title, line]) => `${title}: ${line.label}`)];
    return () => table(columns, rollouts.map((x) => [number(x), ...series.map(([, line]) => {
      const at = line.x.indexOf(x);
      return at < 0 ? "" : number(line.y[at], 4);
    })]), run.name);
  });
  const details = h("details", {}, h("summary", {}, "All numbers"));
  details.addEventListener("toggle", () => details.append(...blocks.splice(0).map((make) => make())));
  return details;
}
