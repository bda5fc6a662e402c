"use strict";
// Figures come as data without colours of text and grid; those follow the theme.
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;

function themed() {
  const style = getComputedStyle(root);
  const text = style.getPropertyValue("--text").trim(), line = style.getPropertyValue("--line").trim();
  const soft = style.getPropertyValue("--soft").trim(), panel = style.getPropertyValue("--panel").trim();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: soft, tickcolor: soft };
  return { text, line, soft, panel, axis };
}

function layoutOf(given) {
  const { text, line, soft, panel, axis } = themed();
  const layout = Object.assign({}, given, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: text },
    font: { color: text, family: "system-ui, sans-serif", size: 13 },
    hoverlabel: { bgcolor: panel, bordercolor: soft, font: { color: text } },
    xaxis: Object.assign({}, given.xaxis, axis), yaxis: Object.assign({}, given.yaxis, axis),
  });
  if (given.sliders) {
    layout.sliders = given.sliders.map((slider) => Object.assign({}, slider, {
      bordercolor: soft, bgcolor: line, activebgcolor: soft, tickcolor: soft, font: { color: text },
    }));
  }
  return layout;
}

function drawAll() {
  for (const [name, figure] of Object.entries(figures)) {
    const data = figure.data.map((trace) => Object.assign({}, trace));
    Plotly.react("plot-" + name, data, layoutOf(figure.layout), { responsive: true, displaylogo: false, displayModeBar: "hover" });
  }
}

function setTheme(name) {
  root.dataset.theme = name;
  drawAll();
}

for (const button of document.querySelectorAll(".choices button")) {
  button.addEventListener("click", () => {
    const figure = figures[button.dataset.figure];
    const choice = figure.choices[Number(button.dataset.choice)];
    figure.data.forEach((trace, place) => { trace.x = choice.x[place]; });
    figure.layout.xaxis.title.text = choice.label;
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    drawAll();
  });
}
document.getElementById("theme").addEventListener("click", () => {
  setTheme(root.dataset.theme === "dark" ? "light" : "dark");
});
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
