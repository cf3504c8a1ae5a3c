// Draws each figure when it comes near the screen, the others while the browser has nothing to do, and all of
// them before printing; in the page's light or dark template.
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

  // The observer also calls when it starts to look: nothing has changed then.
  const fit = new ResizeObserver((entries) =>
    entries.forEach(({ target: plot }) => {
      if (plot.dataset.drawn === String(plot.clientWidth)) return;
      plot.dataset.drawn = plot.clientWidth;
      Plotly.Plots.resize(plot);
    }),
  );

  const draw = (plot, look = template()) => {
    if (plot.dataset.drawn) return;
    plot.dataset.drawn = plot.clientWidth;
    const figure = JSON.parse(plot.nextElementSibling.textContent);
    const layout = { ...figure.layout, template: look };
    if (!mouse) layout.dragmode = false;
    Plotly.newPlot(plot, { data: figure.data, layout, frames: figure.frames, config }).then(() => fit.observe(plot));
  };

  const plots = [...document.querySelectorAll(".plot")];
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "800px" },
  );
  plots.forEach((plot) => near.observe(plot));

  // A reader who does not scroll, a screenshot or a saved page finds every figure too.
  const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 100));
  const rest = () => {
    const next = plots.find((plot) => !plot.dataset.drawn);
    if (!next) return;
    draw(next);
    idle(rest);
  };
  window.addEventListener("load", () => idle(rest));

  // Paper is narrower than most screens: the page takes its width first, then every figure is drawn for it.
  const clear = (plot) => {
    if (!plot.dataset.drawn) return;
    fit.unobserve(plot);
    Plotly.purge(plot);
    delete plot.dataset.drawn;
  };
  window.addEventListener("beforeprint", () => {
    document.body.classList.add("paper");
    plots.forEach((plot) => {
      clear(plot);
      draw(plot, templates.light);
    });
  });
  window.addEventListener("afterprint", () => {
    document.body.classList.remove("paper");
    plots.forEach((plot) => {
      clear(plot);
      near.unobserve(plot);
      near.observe(plot);
    });
    idle(rest);
  });
  dark.addEventListener("change", () =>
    plots.filter((plot) => plot.dataset.drawn).forEach((plot) => Plotly.relayout(plot, { template: template() })),
  );
})();
