"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);

function layoutOf(chart, place) {
  const width = place.clientWidth;
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
  const layout = structuredClone(chart.layout);
  layout.xaxis = { ...axis, ...layout.xaxis };
  layout.yaxis = { ...axis, ...layout.yaxis };
  if (layout.xaxis.title?.text === "round") {
    const last = Math.max(...chart.data.flatMap((trace) => trace.x));
    layout.xaxis.dtick = Math.max(1, Math.ceil(last / (width < 500 ? 6 : 12)));
    layout.xaxis.tick0 = 0;
  }
  const named = chart.data.filter((trace) => trace.showlegend !== false && trace.name);
  return {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 50, r: 14, t: 10, b: 40 },
    showlegend: named.length > 1,
    legend: { orientation: "h", y: -0.22, yanchor: "top", x: 0 },
    height: place.clientHeight,
    ...layout,
  };
}

function draw() {
  charts.forEach((chart, number) => {
    const place = document.getElementById(`chart-${number}`);
    Plotly.react(place, chart.data, layoutOf(chart, place), { responsive: true, displaylogo: false, displayModeBar: false });
  });
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
