"use strict";
// Plotly in the page's colours. Charts are drawn again when the browser changes between light and dark. Needs dom.js.

const charts = new Map(); // element -> () => [traces, layout]

function cssVariable(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const SERIES = ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6"];
const seriesColour = (index) => cssVariable(SERIES[index % SERIES.length]);

/** Draw, or draw again, what `make` returns into `element`. */
function drawChart(element, make) {
  charts.set(element, make);
  const [traces, layout] = make();
  const colours = { text: cssVariable("--text"), line: cssVariable("--line"), panel: cssVariable("--panel") };
  for (const [name, axis] of Object.entries(layout)) {
    if (/^[xy]axis/.test(name)) layout[name] = { gridcolor: colours.line, zerolinecolor: colours.line, automargin: true, ...axis };
  }
  return Plotly.react(element, traces, {
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: "system-ui, sans-serif", size: 12, color: colours.text },
    margin: { l: 48, r: 12, t: 12, b: 40 },
    hoverlabel: { bgcolor: colours.panel, bordercolor: colours.line, font: { color: colours.text } },
    ...layout,
  }, { displaylogo: false, responsive: true, displayModeBar: false });
}

function redrawCharts() {
  for (const [element, make] of charts) drawChart(element, make);
}

/** Forget charts that are no longer on the page. */
function dropCharts() {
  for (const element of charts.keys()) {
    if (element.isConnected) continue;
    Plotly.purge(element);
    charts.delete(element);
  }
}

/**
 * A histogram with logarithmic shares. edges: B + 1 numbers; series: [{ label, counts, colour: CSS variable }]. Counts are
 * drawn as shares of each series, so that series of different size can be compared.
 */
function drawHistogram(element, title, edges, series) {
  const centres = edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);
  drawChart(element, () => [
    series.map(({ label, counts, colour }) => {
      const total = counts.reduce((sum, count) => sum + count, 0) || 1;
      return {
        type: "bar", width: edges[1] - edges[0], marker: { color: cssVariable(colour), line: { width: 0 } }, opacity: 0.55,
        name: label, x: centres, y: counts.map((count) => count / total),
        hovertemplate: "%{x:.4g}: %{y:.3%}<extra>%{fullData.name}</extra>",
      };
    }),
    {
      height: 230,
      xaxis: { title: { text: title, standoff: 6 } },
      yaxis: { type: "log", dtick: 1, tickformat: "~%", title: { text: "share of tokens", standoff: 4 } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      margin: { l: 56, r: 8, t: 30, b: 44 },
      hovermode: "x", barmode: "overlay",
    },
  ]);
}
