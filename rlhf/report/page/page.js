"use strict";
(() => {
  let data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)"), paper = matchMedia("print");
  const LIGHT = ["#0072b2", "#d55e00", "#007a5a", "#b0538d", "#8a6d00", "#1b1f24"];
  const DARK = ["#58b0e8", "#ff9a57", "#4fd0a5", "#e79ac9", "#e9c46a", "#e6e9ec"];
  const WHOLE = [0, 1, 2, 3, 4, 5, 6].flatMap((power) => [1, 2, 5].map((each) => each * 10 ** power));
  const drawn = new Map(); // id of a chart -> its uPlot

  const make = (name, text, className) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const shown = (figure) => {
    if (figure === null || figure === undefined) return "-";
    const size = Math.abs(figure);
    if (size >= 1e5) return figure.toLocaleString("en", { maximumFractionDigits: 0 });
    return size !== 0 && size < 1e-3 ? Number(figure.toPrecision(3)).toExponential() : String(Number(figure.toPrecision(4)));
  };

  // Charts. All curves of a chart share the x values: where one has a point, the others may have a gap.
  function aligned(chart) {
    const all = [];
    chart.curves.forEach((curve, number) => curve.x.forEach((x, at) => all.push([x, number, curve.y[at]])));
    all.sort((a, b) => a[0] - b[0]);
    const xs = [], ys = chart.curves.map(() => []);
    for (const [x, number, y] of all) {
      // marks of a scatter plot, and two values of one curve at the same x, get separate columns
      if (chart.curves[number].marks || !xs.length || xs[xs.length - 1] !== x || ys[number][xs.length - 1] !== null) {
        xs.push(x);
        ys.forEach((column) => column.push(null));
      }
      ys[number][xs.length - 1] = y;
    }
    return [xs, ...ys];
  }

  // Six colours that the colour-blind can distinguish. The next six curves are dashed or hollow.
  function look(number) {
    const colours = dark.matches && !paper.matches ? DARK : LIGHT;
    const colour = colours[number % colours.length], hollow = Math.floor(number / colours.length) % 2 === 1;
    return { colour, fill: hollow ? value("--paper") : colour, dash: hollow ? [5, 4] : [] };
  }

  function swatch({ colour, fill }) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    svg.setAttribute("viewBox", "-1 -1 12 12");
    for (const [name, size] of [["width", "10"], ["height", "10"], ["rx", "2"], ["fill", fill], ["stroke", colour], ["stroke-width", "2"]]) rect.setAttribute(name, size);
    svg.append(rect);
    return svg;
  }

  function legend(figure, chart, at) {
    const place = figure.querySelector(".legend");
    place.replaceChildren();
    const u = drawn.get(figure.id);
    if (at !== null && at !== undefined && u) place.append(make("span", `${chart.x} ${shown(u.data[0][at])}`));
    chart.curves.forEach((curve, number) => {
      if (chart.curves.length === 1 && (at === null || at === undefined)) return;
      const item = make("span");
      const y = at === null || at === undefined || !u ? undefined : u.data[number + 1][at];
      item.append(swatch(look(number)), y === undefined || y === null ? curve.name : `${curve.name} ${shown(y)}`);
      place.append(item);
    });
  }

  function draw(figure) {
    const chart = data.charts[figure.id];
    if (!chart) return;
    const plot = figure.querySelector(".plot");
    const ink = value("--soft"), rule = value("--rule"), healthy = value("--healthy");
    const columns = aligned(chart);
    if (drawn.has(figure.id)) drawn.get(figure.id).destroy();
    drawn.delete(figure.id);
    const single = columns[0].length <= 40;
    const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
    const options = {
      width: Math.max(200, plot.clientWidth), height: plot.clientHeight,
      legend: { show: false }, cursor: { y: false, drag: { x: true, y: false }, points: { size: 7 } },
      scales: { x: { time: false }, y: { range: (u, low, high) => span(low, high, chart.least, chart.most) } },
      axes: [
        { ...axis, label: chart.x, labelSize: 18, size: 34, ...(chart.x === "step" ? { incrs: WHOLE } : {}) },
        { ...axis, size: 56, values: (u, ticks) => ticks.map(shown), label: chart.unit, labelSize: 18 },
      ],
      series: [{}, ...chart.curves.map((curve, number) => {
        const { colour, fill, dash } = look(number);
        return {
          label: curve.name, stroke: colour, dash, width: 1.6, spanGaps: true,
          ...(curve.marks ? { paths: () => null, points: { show: true, size: 6, width: 1.6, fill } } : { points: { show: single, size: 5, fill } }),
        };
      })],
      hooks: {
        drawClear: [(u) => {
          const { ctx, bbox } = u;
          const y = (figure) => u.valToPos(figure, "y", true);
          ctx.save();
          ctx.beginPath();
          ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
          ctx.clip();
          if (chart.low !== null || chart.high !== null) {
            const top = chart.high === null ? bbox.top : y(chart.high);
            const bottom = chart.low === null ? bbox.top + bbox.height : y(chart.low);
            ctx.fillStyle = healthy;
            ctx.fillRect(bbox.left, top, bbox.width, bottom - top);
          }
          if (chart.diagonal) {
            const ends = [u.scales.x.min, u.scales.x.max];
            ctx.strokeStyle = ink;
            ctx.setLineDash([6, 5]);
            ctx.beginPath();
            ctx.moveTo(u.valToPos(ends[0], "x", true), y(ends[0]));
            ctx.lineTo(u.valToPos(ends[1], "x", true), y(ends[1]));
            ctx.stroke();
          }
          ctx.restore();
        }],
        setCursor: [(u) => legend(figure, chart, u.cursor.idx)],
      },
    };
    drawn.set(figure.id, new uPlot(options, columns, plot));
    legend(figure, chart, null);
  }

  function span(low, high, least, most) {
    if (low === null || high === null) return [0, 1];
    const margin = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    return [Math.max(least ?? -Infinity, low - margin), Math.min(most ?? Infinity, high + margin)];
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "300px" });
  // Charts outside the view are drawn one by one when the browser is idle, and before printing.
  const waiting = () => [...document.querySelectorAll("figure.chart")].filter((figure) => !drawn.has(figure.id) && data.charts[figure.id] && !figure.closest("details:not([open])"));
  const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 30));
  function fill() {
    const [next] = waiting();
    if (!next) return;
    draw(next);
    idle(fill);
  }
  addEventListener("beforeprint", () => waiting().forEach(draw));
  paper.addEventListener("change", () => redraw()); // to the colours and width of paper, and back
  const redraw = () => [...drawn.keys()].forEach((id) => draw(document.getElementById(id)));
  let resized;
  addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(redraw, 150);
  });
  dark.addEventListener("change", redraw);

  // The values of a chart as a table, made when a reader opens it.
  function tabulate(details) {
    const place = details.querySelector(".scroll"), figure = details.closest("figure");
    const chart = data.charts[figure.id];
    if (!details.open || !chart) return;
    const table = make("table"), head = make("tr"), body = make("tbody"), top = make("thead");
    [chart.x, ...chart.curves.map((curve) => curve.name)].forEach((name) => {
      const cell = make("th", name);
      cell.scope = "col";
      head.append(cell);
    });
    const [xs, ...ys] = aligned(chart);
    xs.forEach((x, at) => {
      const row = make("tr"), first = make("th", shown(x));
      first.scope = "row";
      row.append(first, ...ys.map((column) => make("td", shown(column[at]))));
      body.append(row);
    });
    top.append(head);
    table.append(top, body);
    place.replaceChildren(table);
  }

  function attach(root) {
    root.querySelectorAll("figure.chart").forEach((figure) => seen.observe(figure));
    root.querySelectorAll("details.figures").forEach((details) => details.addEventListener("toggle", () => tabulate(details)));
  }

  // Answers.
  const PAGE = 10;
  let at = 0;
  const control = (id) => document.getElementById(id);
  const kind = () => data.answers.kinds[0];
  const called = (name) => data.answers.titles[name] ?? name;
  const scoreOf = (answer) => (answer && kind() && typeof answer[kind()] === "number" ? answer[kind()] : null);
  const change = (row) => {
    const before = scoreOf(row.answers[control("left").value]), after = scoreOf(row.answers[control("right").value]);
    return before === null || after === null ? null : after - before;
  };

  function chosen() {
    const left = control("left").value, right = control("right").value;
    const words = control("search").value.toLowerCase(), filter = control("filter").value;
    const rows = data.answers.rows.filter((row) => {
      const a = row.answers[left], b = row.answers[right], by = change(row);
      if (filter === "better" && !(by > 0)) return false;
      if (filter === "worse" && !(by !== null && by < 0)) return false;
      if (filter === "same" && !(a && b && a.text === b.text)) return false;
      if (filter === "cut" && !(b && b.stopped === false)) return false;
      if (!words) return true;
      const texts = [...row.prompt.map((turn) => turn[1]), a ? a.text : "", b ? b.text : ""];
      return texts.some((text) => text.toLowerCase().includes(words));
    });
    const last = (figure, empty) => (figure === null || figure === undefined ? empty : figure);
    const orders = {
      worst: (a, b) => last(change(a), Infinity) - last(change(b), Infinity),
      best: (a, b) => last(change(b), -Infinity) - last(change(a), -Infinity),
      top: (a, b) => last(scoreOf(b.answers[right]), -Infinity) - last(scoreOf(a.answers[right]), -Infinity),
      long: (a, b) => (b.answers[right]?.tokens ?? 0) - (a.answers[right]?.tokens ?? 0),
    };
    const order = orders[control("order").value];
    return order ? rows.sort(order) : rows;
  }

  function side(name, answer, by) {
    const box = make("div"), head = make("h4", called(name));
    if (!answer) {
      box.append(head, make("p", "no answer"));
      return box;
    }
    const facts = [`${answer.tokens} tokens`];
    if (answer.stopped === false) facts.push("cut off");
    for (const name of data.answers.kinds) if (typeof answer[name] === "number") facts.push(`${name} ${shown(answer[name])}`);
    head.append(` · ${facts.join(" · ")}`);
    if (by) head.append(" · ", make("span", `${by > 0 ? "+" : ""}${shown(by)}`, by > 0 ? "up" : "down"));
    box.append(head, make("p", answer.text || "(empty)"));
    return box;
  }

  function list() {
    const rows = chosen(), last = Math.max(0, Math.ceil(rows.length / PAGE) - 1);
    at = Math.min(at, last);
    const left = control("left").value, right = control("right").value;
    const shownRows = rows.slice(at * PAGE, (at + 1) * PAGE).map((row) => {
      const box = make("article", undefined, "exchange"), head = make("h3"), pair = make("div", undefined, "pair");
      if (row.prompt.length === 1) head.textContent = row.prompt[0][1] || "(empty prompt)";
      else if (!row.prompt.length) head.textContent = "(empty prompt)";
      else row.prompt.forEach(([role, text]) => head.append(make("span", `${role}: ${text}`, "turn")));
      pair.append(side(left, row.answers[left]), side(right, row.answers[right], change(row)));
      box.append(head, pair);
      return box;
    });
    control("answer-list").replaceChildren(...shownRows);
    const first = rows.length ? at * PAGE + 1 : 0;
    control("answer-count").textContent = `${first} to ${Math.min(rows.length, (at + 1) * PAGE)} of ${rows.length} prompts`;
    control("earlier").disabled = at === 0;
    control("later").disabled = at >= last;
  }

  function answers() {
    if (!control("answers")) return;
    const { policies, before, after } = data.answers;
    for (const [id, usual] of [["left", before], ["right", after]]) {
      control(id).replaceChildren(...policies.map((name) => new Option(called(name), name)));
      control(id).value = usual;
    }
    control("answer-controls").addEventListener("input", () => { at = 0; list(); });
    control("answer-controls").addEventListener("submit", (event) => event.preventDefault());
    control("earlier").addEventListener("click", () => { at -= 1; list(); });
    control("later").addEventListener("click", () => { at += 1; list(); });
    list();
  }

  // A browser lets only a page from this computer or over HTTPS copy. Elsewhere a click marks the text.
  document.querySelectorAll("button[data-copy]").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const text = control(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(text);
      }
    });
  });

  const raw = new Map([...document.querySelectorAll("[data-part]")].map((part) => [part.id, part.outerHTML]));
  attach(document);
  answers();
  idle(fill);

  // Live: ask the server for changes and replace the changed parts. Opened details stay open.
  const live = document.body.dataset.stamp;
  if (live === undefined) return;
  let stamp = live, quiet = false;
  async function poll() {
    try {
      const answer = await fetch(location.pathname, { headers: { "If-None-Match": stamp }, cache: "no-store" });
      if (answer.status === 200) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        stamp = fresh.body.dataset.stamp;
        renew(fresh);
      }
      quiet = false;
    } catch {
      quiet = true;
    }
    const note = document.getElementById("connection");
    if (note) note.textContent = quiet ? "The watch has ended; this is what it showed last." : "";
    setTimeout(poll, 2000);
  }
  function renew(fresh) {
    const before = data;
    data = JSON.parse(fresh.getElementById("data").textContent);
    const parts = [...fresh.querySelectorAll("[data-part]")];
    if (parts.some((part) => !document.getElementById(part.id)) || (!control("answers") && fresh.getElementById("answers"))) {
      location.reload(); // the new page has a part that this one lacks
      return;
    }
    for (const part of parts) {
      if (raw.get(part.id) === part.outerHTML) continue;
      raw.set(part.id, part.outerHTML);
      const old = document.getElementById(part.id);
      const open = [...old.querySelectorAll("details")].map((each) => each.open);
      const ids = [...old.querySelectorAll("figure.chart")].map((figure) => figure.id);
      const visible = ids.filter((id) => drawn.has(id));
      visible.forEach((id) => { drawn.get(id).destroy(); drawn.delete(id); });
      const taken = document.importNode(part, true);
      [...taken.querySelectorAll("details")].forEach((each, number) => { each.open = open[number] ?? each.open; });
      old.replaceWith(taken);
      attach(taken);
    }
    for (const id of [...drawn.keys()]) {
      const figure = document.getElementById(id);
      if (figure && JSON.stringify(before.charts[id]) !== JSON.stringify(data.charts[id])) draw(figure);
    }
  }
  setTimeout(poll, 2000);
})();
