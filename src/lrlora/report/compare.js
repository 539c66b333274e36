// What compares runs: how far their updates act on the same directions, and what each would keep at a smaller size.
function showOverlaps() {
  const { overlap } = data;
  $("overlap").hidden = !overlap;
  if (!overlap) return;
  const chances = overlap.pairs.map(({ chance }) => chance);
  const [least, most] = [Math.min(...chances), Math.max(...chances)].map(asShare);
  $("chance").textContent = least === most ? least : `${least} to ${most}`;
  const some = [...new Set(overlap.pairs.flatMap((pair) => pair.runs))].sort((a, b) => a - b);
  const similarity = (i, j) => (i === j ? 1 : overlap.pairs.find((pair) => pair.runs.includes(i) && pair.runs.includes(j))?.mean);
  fillMap($("overlaps"), "", some.map((i) => runs[i].name), some.map((i) => runs[i].name), some.map((i) => some.map((j) => similarity(i, j))));
  overlap.pairs.forEach(({ runs: [i, j] }, at) => $("pair").append(make("option", { value: at }, `${runs[i].name} and ${runs[j].name}`)));
  $("pair").addEventListener("change", showOverlap);
}
function showOverlap() {
  if (!data.overlap) return;
  const { numbers, modules, pairs } = data.overlap;
  const pair = pairs[$("pair").value];
  const here = pair.modules[modules.indexOf(state.module)];
  const [first, second] = pair.runs.map((i) => runs[i].name);
  $("overlap-map").parentElement.hidden = !here;
  $("closely").replaceChildren(make("h3", {}, state.module ?? ""), make("p", { class: "hint" }, here
    ? `How far the first 1, 2, 4, … directions of ${first} (rows) and of ${second} (columns) overlap. Directions at random would give the larger of both numbers over ${here.n}.`
    : `${first} and ${second} do not both have directions of this module that can be compared.`));
  if (!here) return;
  $("overlap-map").setAttribute("aria-label", `Overlap of ${first} and ${second} in ${state.module}`);
  fillMap($("overlap-map"), "directions", numbers.slice(0, here.values.length), numbers.slice(0, here.values[0].length), here.values);
}
const asShare = (value) => (value === undefined ? "–" : value < 0.01 ? String(Number(value.toPrecision(1))) : value.toFixed(2));
// Values in [0, 1] as a table of shades.
function fillMap(table, corner, rows, columns, values) {
  const head = make("tr", {}, make(corner ? "th" : "td", corner ? { scope: "col" } : {}, corner), ...columns.map((name) => make("th", { scope: "col" }, String(name))));
  const body = values.map((line, i) => make("tr", {}, make("th", { scope: "row" }, String(rows[i])),
    ...line.map((value) => make("td", { class: "shade", style: value === undefined ? "" : painted(value) }, asShare(value)))));
  table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
}

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

