"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");

function look() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true };
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), size: narrow.matches ? 11 : 12, family: "system-ui, sans-serif" },
      xaxis: axis,
      yaxis: axis,
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    },
  };
}

function show(place, { data, layout }) {
  const shared = {
    template: look(),
    margin: { l: 8, r: 12, t: 24, b: 8 },
    hovermode: "x unified",
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 },
    dragmode: false,
  };
  return Plotly.react(place, data, { ...shared, ...layout }, { displayModeBar: false, responsive: true });
}

function draw() {
  for (const place of document.querySelectorAll(".chart[data-figure]")) {
    show(place, JSON.parse(document.getElementById(place.dataset.figure).textContent));
  }
}

draw();
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
