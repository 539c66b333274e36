// State: which measure, at which place in time, of which module. `show` draws everything from it. The last place is the
// adapter as it was saved, which need not be that of the last step: the best checkpoint may be back.
const data = JSON.parse(document.getElementById("data").textContent);
const charts = JSON.parse(document.getElementById("charts").textContent);
const { measures, recorded, runs, colours } = data;
const [DARK, LIGHT] = ["#00224e", "#fee838"]; // of a heat map, told apart by the colorblind
const steps = [...new Set(runs.flatMap((run) => run.history.map((record) => record.step)))].sort((a, b) => a - b);
const state = { beside: [], measure: data.opening, step: steps.length, module: null, sort: null, descending: true };
const views = {}; // chart → promise of its view

const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") element.style.cssText = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};
const measureOf = (key) => measures.find((measure) => measure.key === key);
const written = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const scaled = (value, key) => (value === null || value === undefined ? null : value * measureOf(key).factor);
function shown(value, key) {
  const { digits } = measureOf(key);
  return written(scaled(value, key), Number.isInteger(value) && digits === 1 ? 0 : digits);
}
const asSaved = () => state.step >= steps.length;
const placeInTime = () => (asSaved() ? "as saved" : String(steps[state.step]));
const shapeOf = ({ m, n, r }) => `${m} × ${n}, r = ${r ?? "–"}`;

// The rows of a run at the chosen place in time: those of its last record until then.
function rowsAt(run) {
  if (asSaved() || !run.history.length) return run.modules;
  const until = run.history.filter((record) => record.step <= steps[state.step]);
  const { values } = until.length ? until[until.length - 1] : run.history[0];
  return run.modules.map((row, i) => ({ ...row, ...Object.fromEntries(recorded.map((key, j) => [key, values[i][j]])) }));
}
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const known = (rows, key) => rows.map((row) => row[key]).filter((value) => value !== null);

function showFacts() {
  runs.forEach((run, i) => {
    const list = make("dl");
    for (const [name, value] of Object.entries(run.facts)) list.append(make("dt", {}, name), make("dd", {}, value));
    $("runs").append(make("div", { style: `--run: ${colours[i]}` }, make("h2", { style: "font-size:1rem;margin:0 0 .4rem" }, run.name), list));
  });
}

// Heat maps: tables, so that a keyboard and a screen reader can walk them.
function showMaps() {
  const all = runs.map(rowsAt);
  const key = state.measure;
  // One scale for all runs and all of time.
  let largest = 0;
  for (const run of runs) {
    for (const row of run.modules) largest = Math.max(largest, row[key] ?? 0);
    for (const { values } of run.history) for (const row of values) largest = Math.max(largest, row[recorded.indexOf(key)] ?? 0);
  }
  const focused = document.activeElement?.dataset?.at;
  const scrolled = [...$("maps").querySelectorAll(".scroll")].map((part) => part.scrollLeft);
  $("maps").replaceChildren(...runs.map((run, i) => mapOf(run, all[i], key, largest, i)));
  $("maps").querySelectorAll(".scroll").forEach((part, i) => { part.scrollLeft = scrolled[i] ?? 0; });
  if (focused) document.querySelector(`[data-at="${focused}"]`)?.focus({ preventScroll: true });
}
const inOrder = (a, b) => {
  const [first, second] = [a, b].map((position) => (position === null ? [Infinity] : position.split(".").map(Number)));
  const at = first.findIndex((number, i) => number !== second[i]);
  return at < 0 ? first.length - second.length : first[at] - (second[at] ?? -1);
};
// A stack of layers: its modules by place in the layer, and by position of the layer.
function stackOf(name, rows, key, largest, label, runIndex, above) {
  const places = [...new Set(rows.map((row) => row.place))];
  const positions = [...new Set(rows.map((row) => row.position))].sort(inOrder);
  const cells = new Map();
  rows.forEach((row) => {
    const at = `${places.indexOf(row.place)},${positions.indexOf(row.position)}`;
    cells.set(at, [...(cells.get(at) || []), row]);
  });
  const table = make("table", { class: "map", "aria-label": label });
  table.append(make("thead", {}, make("tr", {}, make("th", { scope: "col" }, name ?? "layer"), ...positions.map((position) => make("th", { scope: "col" }, position ?? "–")))));
  const body = make("tbody");
  places.forEach((place, line) => {
    const type = rows.find((row) => row.place === place).type, y = above + line;
    const tr = make("tr", {}, make("th", { scope: "row", title: type }, place));
    positions.forEach((position, x) => {
      const here = cells.get(`${line},${x}`);
      if (!here) return tr.append(make("td"));
      const value = mean(known(here, key));
      const share = value === null || !largest ? 0 : Math.min(1, value / largest);
      // White on dark and black on light shades: each pair has a contrast of at least 4.5.
      const painted = `background:color-mix(in oklab, ${DARK}, ${LIGHT} ${100 * share}%);color:${share > 0.455 ? "#000" : "#fff"}`;
      const isChosen = here.some((row) => row.module === state.module);
      const cell = make("button", {
        type: "button", class: "cell", style: painted, tabindex: "-1",
        "data-at": `${runIndex},${y},${x}`, "data-module": here[0].module, "aria-pressed": String(isChosen),
        "aria-label": `${here.length > 1 ? `mean of ${here.length} modules ${type}, layer ${position}` : here[0].module}: ${measureOf(key).label} ${shown(value, key)}`,
      }, shown(value, key));
      cell.rows = here;
      tr.append(make("td", {}, cell));
    });
    body.append(tr);
  });
  table.append(body);
  return table;
}
function mapOf(run, rows, key, largest, runIndex) {
  const stacks = [...new Set(rows.map((row) => row.stack))].filter((stack) => stack !== null);
  const named = stacks.length > 1;
  const tables = make("div", {});
  (stacks.length ? stacks : [null]).forEach((stack) => {
    // What is outside of layers is shown below the first stack.
    const inside = rows.filter((row) => (row.stack ?? stacks[0] ?? null) === stack);
    const label = `${measureOf(key).label} of ${run.name}${named ? `, ${stack}` : ""}`;
    const above = tables.querySelectorAll("tbody tr").length;
    tables.append(make("div", { class: "scroll" }, stackOf(named ? stack : null, inside, key, largest, label, runIndex, above)));
  });
  (tables.querySelector('[aria-pressed="true"]') || tables.querySelector(".cell"))?.setAttribute("tabindex", "0");
  const scale = make("div", { class: "scale", "aria-hidden": "true" }, "0", make("i", { style: `background:linear-gradient(90deg in oklab, ${DARK}, ${LIGHT})` }), shown(largest, key));
  return make("div", {}, make("h3", {}, run.name), scale, tables);
}
function choose(cell) {
  state.module = cell.rows[0].module;
  state.beside = cell.rows.map((row) => row.module);
  show();
}
function moveFocus(event) {
  const cell = event.target.closest(".cell");
  const move = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
  if (!cell || !move) return;
  event.preventDefault();
  let [run, y, x] = cell.dataset.at.split(",").map(Number);
  for (let tries = 0; tries < 200; tries++) {
    [x, y] = [x + move[0], y + move[1]];
    const next = document.querySelector(`[data-at="${run},${y},${x}"]`);
    if (next) {
      cell.tabIndex = -1;
      next.tabIndex = 0;
      return next.focus();
    }
  }
}
function tip(event) {
  const cell = event.target.closest?.(".cell");
  $("tip").hidden = !cell || ["mouseout", "focusout"].includes(event.type);
  if ($("tip").hidden) return;
  $("tip").textContent = cell.rows.slice(0, 4).map((row) => [
    row.module, shapeOf(row), ...measures.map(({ key, label }) => `${label}: ${shown(row[key], key)}`),
  ].join("\n")).join("\n\n") + (cell.rows.length > 4 ? `\n\nand ${cell.rows.length - 4} more` : "");
  const box = cell.getBoundingClientRect();
  const left = Math.min(box.left, window.innerWidth - $("tip").offsetWidth - 8);
  const below = box.bottom + 8 + $("tip").offsetHeight < window.innerHeight;
  $("tip").style.left = `${Math.max(left, 8)}px`;
  $("tip").style.top = `${below ? box.bottom + 8 : Math.max(box.top - 8 - $("tip").offsetHeight, 8)}px`;
}

function showModule() {
  const found = runs.map((run) => rowsAt(run).find((row) => row.module === state.module));
  const lines = runs.flatMap((run, i) => found[i] ? [make("div", { class: "numbers" },
    ...(runs.length > 1 ? [make("span", {}, run.name)] : []),
    make("span", {}, shapeOf(found[i])),
    ...measures.map(({ key, label }) => make("span", {}, `${label} `, make("b", { "data-key": key }, shown(found[i][key], key)))))] : []);
  const name = make("h3", {}, state.module ?? "");
  if (state.beside.length > 1 && state.beside.includes(state.module)) {
    // Experts share a cell.
    const others = make("select", { "aria-label": "Module of the cell" }, ...state.beside.map((module) => make("option", module === state.module ? { selected: "" } : {}, module)));
    others.addEventListener("change", () => { state.module = others.value; show(); });
    name.replaceChildren(others);
  }
  $("module-name").replaceChildren(name, ...lines);
  const curve = [], entries = [], spectrum = [];
  runs.forEach((run) => {
    const phi = run.curves[state.module];
    if (phi) {
      const z = phi.phi.map((_, i) => phi.z[0] + ((phi.z[1] - phi.z[0]) * i) / (phi.phi.length - 1));
      z.forEach((point, i) => {
        curve.push({ run: run.name, which: "learned", z: point, value: phi.phi[i] });
        if (phi.start.length) curve.push({ run: run.name, which: "start", z: point, value: phi.start[i] });
      });
      phi.entries.forEach((share, i) => entries.push({ run: run.name, z: z[i], share }));
    }
    const values = run.spectra[state.module];
    if (values) {
      values.number.forEach((index, i) => spectrum.push({ run: run.name, which: "ΔW", index, sigma: values.sigma[i] }));
      values.linear.forEach((sigma, i) => sigma > 0 && spectrum.push({ run: run.name, which: "s·BA", index: i + 1, sigma }));
    }
  });
  return Promise.all([fill("phi", { curve, entries }), fill("spectrum", { spectrum })]);
}

function showKinds() {
  const key = state.measure;
  const modules = runs.flatMap((run, i) => rowsAt(run).filter((row) => row[key] !== null).map((row, j) => ({
    run: run.name, kind: row.kind, module: row.module, value: scaled(row[key], key),
    centre: (i + 0.5) / runs.length, place: (i + 0.2 + 0.6 * ((j * 0.618034) % 1)) / runs.length,
  })));
  const history = runs.flatMap((run) => run.history.flatMap(({ step, values }) => {
    const column = recorded.indexOf(key);
    const of = (test) => run.modules.flatMap((row, i) => (test(row) && values[i][column] !== null ? [scaled(values[i][column], key)] : []));
    const series = [...new Set(run.modules.map((row) => row.kind))].map((kind) => [kind, (row) => row.kind === kind]);
    if (state.module) series.push(["chosen module", (row) => row.module === state.module]);
    return series.map(([name, test]) => ({ run: run.name, series: name, step, value: mean(of(test)) })).filter((point) => point.value !== null);
  }));
  return Promise.all([fill("kinds", { modules }), fill("history", { history, now: [{ step: steps[Math.min(state.step, steps.length - 1)] }] })]);
}

function showTraining() {
  const which = $("curve").value;
  const wanted = which === "loss" ? ["loss", "eval_loss"] : [which];
  return fill("training", { training: runs.flatMap((run) => run.log.filter((point) => wanted.includes(point.which)).map((point) => ({ ...point, run: run.name }))) });
}

// The table, and what can be saved of it.
const columns = [
  ...(runs.length > 1 ? [["run", "run"]] : []), ["module", "module"], ["kind", "kind"], ["m", "m"], ["n", "n"], ["r", "r"],
  ...measures.map(({ key, label }) => [key, label]), ...(recorded.includes("phi_zero") ? [["phi_zero", "φ(0)"]] : []),
];
const isText = (key) => ["run", "module", "kind"].includes(key);
function tableRows() {
  const rows = runs.flatMap((run) => rowsAt(run).map((row) => ({ run: run.name, ...row })));
  if (!state.sort) return rows;
  const direction = state.descending ? -1 : 1;
  const compare = (a, b) => (a === null) - (b === null) || direction * (isText(state.sort) ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
  return rows.sort((a, b) => compare(a[state.sort], b[state.sort]));
}
function showTable() {
  $("table").tHead.replaceChildren(make("tr", {}, ...columns.map(([key, label]) => {
    const direction = state.sort !== key ? "none" : state.descending ? "descending" : "ascending";
    const arrow = { none: "", descending: " ▾", ascending: " ▴" }[direction];
    return make("th", { scope: "col", "aria-sort": direction, class: isText(key) ? "text" : "" }, make("button", { type: "button", "data-sort": key, ...(key === "phi_zero" ? { title: "what φ adds to every entry of ΔW, before scaling" } : {}) }, label + arrow));
  })));
  $("table").tBodies[0].replaceChildren(...tableRows().map((row) => make("tr", {}, ...columns.map(([key]) => {
    if (key === "module") return make("td", { class: "text" }, make("button", { type: "button", "data-open": row.module }, row.module));
    const text = isText(key) ? row[key] : key === "phi_zero" ? written(row[key], 3) : measureOf(key) ? shown(row[key], key) : String(row[key] ?? "–");
    return make("td", isText(key) ? { class: "text" } : {}, text);
  }))));
}
function save(name, type, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
const quoted = (value) => (value === null ? "" : /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
// Shares as shares, not in percent.
const saved = ["run", "at", "module", "layer", "type", "kind", "m", "n", "r", ...recorded];
const savedRows = () => tableRows().map((row) => ({ ...row, at: placeInTime() }));
const asCsv = () => [saved, ...savedRows().map((row) => saved.map((key) => quoted(row[key])))].map((cells) => cells.join(",")).join("\n") + "\n";
const asJson = () => JSON.stringify(savedRows().map((row) => Object.fromEntries(saved.map((key) => [key, row[key]]))), null, 1);

// Scores of the classes, and which are taken for which.
function tableOf(label, heads, rows) {
  const cell = (text, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, text);
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, make("table", { class: "classes" },
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value, i) => (value instanceof Node ? value : cell(value, i))))))));
}
function showClasses() {
  $("classes").hidden = !data.classes.length;
  for (const { run, count, scores, pairs, names, matrix } of data.classes) {
    const of = runs.length > 1 ? ` of ${run}` : "";
    const left = count > scores.length ? `, the ${scores.length} of ${count} with the lowest F1` : "";
    const part = (title, ...table) => $("classes").append(make("h3", {}, title), tableOf(title, ...table));
    part(`Scores by class${of}${left}`, ["class", "precision", "recall", "F1", "examples"], scores.map(({ label, precision, recall, f1, support }) => [
      label, ...[precision, recall, f1].map((score) => written(score, 3)), support.toLocaleString("en")]));
    if (pairs.length) part(`Most confused${of}`, ["class", "taken for", "examples", "of the class"], pairs.map(({ label, answer, examples, share }) => [
      label, answer, examples.toLocaleString("en"), `${(100 * share).toFixed(0)} %`]));
    if (names.length) part(`Confusion matrix${of}: classes by row, answers by column`, ["class", ...names], matrix.map((row, i) => {
      const total = row.reduce((sum, value) => sum + value, 0) || 1;
      return [names[i], ...row.map((value) => make("td", { style: `background:color-mix(in srgb, var(--accent) ${Math.round((35 * value) / total)}%, transparent)` }, String(value)))];
    }));
  }
}

function showSettings() {
  runs.forEach((run) => Object.entries(run.settings).forEach(([name, content]) => {
    const text = make("pre", { tabindex: "0" }, JSON.stringify(content, null, 2));
    $("settings").append(make("details", {}, make("summary", {}, runs.length > 1 ? `${run.name}: ${name}` : name), text));
  }));
  $("settings").hidden = !runs.some((run) => Object.keys(run.settings).length);
}

// A chart is drawn when there is first something to draw, in the colours of the theme; then it only gets other data.
function embed(chart, datasets) {
  const style = getComputedStyle(document.body);
  const text = style.color, line = style.getPropertyValue("--line");
  const config = {
    background: style.backgroundColor, font: "system-ui, sans-serif", view: { stroke: line },
    axis: { labelColor: text, titleColor: text, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12, labelSeparation: 6 },
    legend: { labelColor: text, titleColor: text, labelFontSize: 12, layout: { top: { direction: "vertical", anchor: "start" } } },
  };
  const actions = { export: true, source: false, compiled: false, editor: false };
  const options = { renderer: "svg", config, actions, downloadFileName: `lrlora-${chart}` };
  return vegaEmbed(`#${chart}`, { ...charts[chart], datasets }, options).then(({ view }) => {
    if (chart === "energy") view.addSignalListener("picked", pickSize);
    $(chart).querySelector("summary")?.setAttribute("aria-label", "Save this chart as SVG or PNG");
    return view;
  });
}
async function fill(chart, datasets) {
  const isEmpty = Object.values(datasets)[0].length === 0;
  $(chart).closest("figure").hidden = isEmpty;
  if (isEmpty) return;
  views[chart] ??= embed(chart, datasets);
  const view = await views[chart];
  for (const [name, rows] of Object.entries(datasets)) view.data(name, rows);
  await view.runAsync();
}
async function redraw() {
  for (const [chart, view] of Object.entries(views)) {
    delete views[chart];
    (await view).finalize();
  }
  $("smallest").replaceChildren();
  await Promise.all([show(), showTraining(), showSize(), showLosses()]);
}

// What each run would keep at a smaller size.
function showSizes() {
  const { sizes } = data;
  $("sizes").hidden = !sizes;
  if (!sizes) return;
  const shares = sizes.kept.filter((points) => points.length);
  // At first, the size at which every run keeps nine tenths.
  const enough = sizes.budgets.findIndex((_, at) => shares.every((points) => points[at][0] >= 0.9));
  $("size").max = sizes.budgets.length - 1;
  $("size").value = enough;
  $("size").addEventListener("input", showSize);
}
function showSize() {
  if (!data.sizes) return undefined;
  const { budgets, kept, commands } = data.sizes;
  const at = Number($("size").value), parameters = budgets[at].toLocaleString("en");
  $("size-shown").textContent = `${parameters} parameters`;
  $("size").setAttribute("aria-valuetext", `${parameters} parameters`);
  const mebibytes = (bytes) => (bytes / 2 ** 20).toLocaleString("en", { maximumSignificantDigits: 3 });
  $("kept").replaceChildren(...runs.flatMap((run, i) => {
    if (!kept[i].length) return [];
    const [share, taken, smallest, mean, largest] = kept[i][at];
    const ranks = smallest === largest ? `rank ${largest} in every module` : `ranks from ${smallest} to ${largest}, ${mean.toFixed(1)} on average`;
    return [make("div", { style: `--run: ${colours[i]}` },
      make("p", {}, make("b", {}, run.name), ` keeps ${(100 * share).toFixed(1)} % of its energy in ${mebibytes(4 * taken)} MiB as float32, ${mebibytes(2 * taken)} MiB as bfloat16, with ${ranks}.`),
      make("code", {}, commands[i].join(budgets[at])))];
  }));
  const energy = runs.flatMap((run, i) => kept[i].map(([share], j) => ({ run: run.name, parameters: budgets[j], share })));
  return fill("energy", { energy, size: [{ parameters: budgets[at] }] });
}
function pickSize(name, { parameters: [picked] = [] }) {
  const at = data.sizes.budgets.indexOf(picked);
  if (at < 0) return;
  $("size").value = at;
  showSize();
}

function showLosses() {
  $("losses").hidden = !data.losses.length;
  for (const { run, text, command } of data.losses)
    $("smallest").append(make("p", {}, `${runs.length > 1 ? `${run}: ` : ""}${text}`), ...(command ? [make("pre", { tabindex: "0" }, command)] : []));
  const points = data.losses.flatMap((of) => of.points);
  return points.length ? fill("loss", { losses: points, chosen: data.losses.map(({ chosen }) => chosen) }) : null;
}

function show() {
  const { label, about } = measureOf(state.measure);
  $("about").textContent = `${label}: ${about}.`;
  document.querySelectorAll(".measure-name").forEach((element) => { element.textContent = label; });
  $("step-shown").textContent = placeInTime();
  $("step").setAttribute("aria-valuetext", placeInTime());
  $("tip").hidden = true;
  showMaps();
  showTable();
  return Promise.all([showModule(), showKinds()]);
}

async function start() {
  for (const { key, label } of measures) $("measure").append(make("option", { value: key }, label));
  const strongest = runs[0].modules.reduce((best, row) => (best && best.energy99_rank >= row.energy99_rank ? best : row), null);
  state.module = strongest?.module ?? null;
  $("time").hidden = steps.length < 2;
  $("step").max = steps.length;
  $("step").value = state.step;
  const curves = [...new Set(runs.flatMap((run) => run.log.map((point) => point.which)))].filter((which) => which !== "eval_loss" || !runs.some((run) => run.log.some((point) => point.which === "loss")));
  for (const which of curves) $("curve").append(make("option", { value: which }, which === "loss" ? "loss, training and validation" : which));
  $("course").hidden = !curves.length;
  showFacts();
  showClasses();
  showSettings();
  showSizes();
  $("measure").value = state.measure;
  $("measure").addEventListener("change", () => { state.measure = $("measure").value; show(); });
  $("step").addEventListener("input", () => { state.step = Number($("step").value); show(); });
  $("curve").addEventListener("change", showTraining);
  $("maps").addEventListener("click", (event) => { const cell = event.target.closest(".cell"); if (cell) choose(cell); });
  $("maps").addEventListener("keydown", moveFocus);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") $("tip").hidden = true; });
  for (const type of ["mouseover", "mouseout", "focusin", "focusout"]) $("maps").addEventListener(type, tip);
  $("table").addEventListener("click", ({ target }) => {
    const sort = target.closest("[data-sort]")?.dataset.sort;
    if (sort) {
      [state.sort, state.descending] = [sort, state.sort === sort ? !state.descending : !isText(sort)];
      showTable();
      document.querySelector(`[data-sort="${sort}"]`).focus();
    }
    const open = target.closest("[data-open]")?.dataset.open;
    if (open) {
      [state.module, state.beside] = [open, []];
      show();
      $("module-title").focus({ preventScroll: true });
      $("module-title").scrollIntoView({ block: "start" });
    }
  });
  $("csv").addEventListener("click", () => save("ranks.csv", "text/csv", asCsv()));
  $("json").addEventListener("click", () => save("ranks.json", "application/json", asJson()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  await Promise.all([show(), showTraining(), showSize(), showLosses()]);
  document.body.dataset.ready = "true";
}
start();
