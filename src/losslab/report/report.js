// Draws each figure when it comes near the screen, in the page's light or dark template.
"use strict";
(() => {
  const templates = JSON.parse(document.getElementById("templates").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const template = () => (dark.matches ? templates.dark : templates.light);
  // Without a mouse the tool bar would never hide, and a finger must scroll the page, not zoom the figure.
  const mouse = window.matchMedia("(hover: hover) and (pointer: fine)").matches;
  const config = {
    displaylogo: false,
    displayModeBar: mouse ? "hover" : false,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  };

  const fit = new ResizeObserver((entries) => entries.forEach((entry) => Plotly.Plots.resize(entry.target)));

  const draw = (plot) => {
    if (plot.dataset.drawn) return;
    plot.dataset.drawn = "yes";
    const figure = JSON.parse(plot.nextElementSibling.textContent);
    const layout = { ...figure.layout, template: template() };
    if (!mouse) layout.dragmode = false;
    Plotly.newPlot(plot, figure.data, layout, config).then(() => fit.observe(plot));
  };

  const plots = [...document.querySelectorAll(".plot")];
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "800px" },
  );
  plots.forEach((plot) => near.observe(plot));
  window.addEventListener("beforeprint", () => plots.forEach(draw));
  dark.addEventListener("change", () =>
    plots.filter((plot) => plot.dataset.drawn).forEach((plot) => Plotly.relayout(plot, { template: template() })),
  );
})();
