"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);

const several = document.querySelectorAll("section.run").length > 1;

function layoutOf(chart, place) {
  const width = place.clientWidth;
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
  const layout = structuredClone(chart.layout);
  layout.xaxis = { ...axis, ...layout.xaxis };
  layout.yaxis = { ...axis, ...layout.yaxis };
  if (layout.xaxis.title?.text === "round") {
    const last = chart.data.reduce((most, trace) => trace.x.reduce((a, b) => Math.max(a, b), most), 0);
    const least = last / (width < 500 ? 6 : 12);
    layout.xaxis.dtick = [1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000].find((step) => step >= least) ?? Math.ceil(least);
    layout.xaxis.tick0 = 0;
  }
  const named = chart.data.filter((trace) => trace.showlegend !== false && trace.name);
  return {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 50, r: 14, t: 10, b: 40 },
    showlegend: named.length > 1 || (named.length && several),
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    height: place.clientHeight,
    ...layout,
  };
}

function draw() {
  charts.forEach((chart, number) => {
    const place = document.getElementById(`chart-${number}`);
    Plotly.react(place, chart.data, layoutOf(chart, place), { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]], toImageButtonOptions: { format: "svg" } });
  });
}

const closed = [];

function beforePrint() {
  closed.push(...document.querySelectorAll("details:not([open])"));
  closed.forEach((part) => { part.open = true; });
  charts.forEach((_, number) => Plotly.relayout(`chart-${number}`, { width: 660 }));
}

function afterPrint() {
  closed.splice(0).forEach((part) => { part.open = false; });
  charts.forEach((_, number) => Plotly.relayout(`chart-${number}`, { width: null, autosize: true }));
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("beforeprint", beforePrint);
addEventListener("afterprint", afterPrint);
