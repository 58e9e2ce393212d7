"use strict";
(function () {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const font = getComputedStyle(document.body).getPropertyValue("--sans").trim();
  const text = { labelColor: "currentColor", titleColor: "currentColor", labelFont: font, titleFont: font };
  const config = {
    background: null,
    font: font,
    view: { stroke: null },
    axis: Object.assign({ grid: false, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal",
      domainColor: "#9aa0a5", tickColor: "#9aa0a5", gridColor: dark ? "#34383b" : "#e4e6e7" }, text),
    legend: Object.assign({ labelFontSize: 11.5, titleFontSize: 12, titleFontWeight: "normal" }, text),
    text: { fill: "currentColor", font: font },
    title: { color: "currentColor", font: font },
  };
  // on paper, strong is dark; on a dark screen, strong must be light
  const night = {
    '"#f1f1ef"': '"#2c3033"', '"#8f3205"': '"#ffcba6"', '"#c8571c"': '"#e98a52"', '"#eab08a"': '"#7d4a2c"',
    '"#9cc0e4"': '"#2f5580"', '"#2f6fb3"': '"#6ea6e0"', '"#123f73"': '"#bfe0ff"',
    '"#ffffff"': '"#1d1f21"', '"#1d1f21"': '"#ffffff"',
  };
  for (const script of document.querySelectorAll("script.spec")) {
    const target = script.parentNode.querySelector(".vega");
    const source = dark ? script.textContent.replace(/"#[0-9a-f]{6}"/g, (c) => night[c] || c) : script.textContent;
    vegaEmbed(target, JSON.parse(source), {
      mode: "vega-lite", renderer: "svg", actions: false, ast: true, config: config,
      tooltip: { theme: "plain", disableDefaultStyle: false },
    }).catch(function (error) {
      target.classList.add("failed");
      target.textContent = "This chart could not be drawn: " + error.message;
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, i) {
      const first = Array.from(body.rows).map((r) => r.cells[i]).find((c) => c.dataset.v !== undefined);
      if (first && (first.matches(".num, .pos, .neg"))) {
        head.classList.add("num");
        for (const row of body.rows) if (row.cells[i].matches(".none")) row.cells[i].classList.add("num");
      }
      head.firstChild.addEventListener("click", function () {
        const down = head.getAttribute("aria-sort") !== "descending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const numeric = head.classList.contains("num");
        const rows = Array.from(body.rows);
        const shown = rows.filter((r) => !r.classList.contains("more")).length;
        rows.sort(function (a, b) {
          const x = a.cells[i].dataset.v, y = b.cells[i].dataset.v;
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
          return down ? -order : order;
        });
        rows.forEach((r, k) => { r.classList.toggle("more", k >= shown); body.appendChild(r); });
      });
    });
  }
  for (const button of document.querySelectorAll("button.all")) {
    button.addEventListener("click", function () {
      button.parentNode.querySelector("table").classList.add("open");
      button.remove();
    });
  }

  for (const graph of document.querySelectorAll("svg.graph")) {
    let pinned = null;
    const edges = Array.from(graph.querySelectorAll("path.edge"));
    const nodes = new Map(Array.from(graph.querySelectorAll(".node")).map((n) => [n.dataset.part, n]));
    const show = function (part) {
      graph.classList.toggle("focus", part !== null);
      nodes.forEach((n, name) => n.classList.toggle("on", name === part));
      for (const edge of edges) {
        const on = edge.dataset.a === part || edge.dataset.b === part;
        edge.classList.toggle("on", on);
        if (on) for (const end of [edge.dataset.a, edge.dataset.b]) nodes.get(end)?.classList.add("on");
      }
    };
    nodes.forEach(function (node, name) {
      node.addEventListener("mouseenter", () => show(name));
      node.addEventListener("mouseleave", () => show(pinned));
      node.addEventListener("click", () => { pinned = pinned === name ? null : name; show(pinned); });
    });
  }
})();
