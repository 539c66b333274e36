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

