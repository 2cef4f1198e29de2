"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const shown = 60;

// One entry a tensor, unfolded from the kinds: layers that are cut alike share one.
const tensors = data.kinds.flatMap((kind) =>
  (kind.layers.length ? kind.layers : [null]).map((layer, index) => ({
    kind,
    layer,
    name: layer === null ? kind.name : kind.name.replace(".N.", `.${layer}.`),
    part: kind.parts[index],
  })),
);
for (const tensor of tensors) {
  tensor.text = `${tensor.name} ${tensor.kind.rule} ${tensor.kind.dtype}`.toLowerCase();
}
// In the order of a forward pass: what comes before the layers, then layer by layer, then the rest.
const order = new Map(data.order.map((name, index) => [name, index]));
const firstInLayer = Math.min(...data.kinds.filter((kind) => kind.layers.length).map((kind) => order.get(kind.name)));
for (const tensor of tensors) {
  const place = order.get(tensor.kind.name);
  const outside = place < firstInLayer ? -1 : Infinity;
  tensor.at = [tensor.layer ?? outside, place];
}
tensors.sort((a, b) => (a.at[0] === b.at[0] ? a.at[1] - b.at[1] : a.at[0] - b.at[0]));

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function rankTable(tensor) {
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const title of ["rank", "stored shape", "from the source", "bytes", "file"]) head.append(element("th", title));
  const body = table.createTBody();
  data.ranks.forEach((rank, index) => {
    const row = body.insertRow();
    const cell = row.insertCell();
    cell.append(element("span", rank.rank, { class: "chip", style: `--h:${rank.hue}` }));
    row.insertCell().textContent = `[${tensor.kind.shapes[index].join(", ")}]`;
    row.insertCell().textContent = tensor.kind.ranges[index];
    row.insertCell().textContent = tensor.kind.bytes[index].toLocaleString("en");
    row.insertCell().textContent = `model-rank-${rank.rank}-part-${tensor.part}.safetensors`;
  });
  return table;
}

function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = tensors.filter((tensor) => words.every((word) => tensor.text.includes(word)));
  const results = document.getElementById("results");
  results.replaceChildren(
    ...found.slice(0, shown).map((tensor) => {
      const entry = element("details");
      const summary = element("summary", tensor.name + " ");
      summary.append(element("span", `${tensor.kind.rule}, ${tensor.kind.dtype}`));
      entry.append(summary);
      entry.addEventListener("toggle", () => {
        if (entry.open && entry.children.length === 1) {
          const scroll = element("div", undefined, { class: "scroll" });
          scroll.append(rankTable(tensor));
          entry.append(scroll);
        }
      });
      return entry;
    }),
  );
  const more = found.length > shown ? `, the first ${shown} shown` : "";
  document.getElementById("found").textContent = `${found.length} of ${tensors.length} tensors a rank${more}`;
}

const search = document.getElementById("search");
function followLink() {
  search.value = decodeURIComponent(location.hash.slice(1)); // page.html#qkv opens with that search
  show();
}
search.addEventListener("input", show);
addEventListener("hashchange", followLink);
followLink();

const buttons = [...document.querySelectorAll(".legend button")];
for (const button of buttons) {
  button.addEventListener("click", () => {
    const chosen = button.getAttribute("aria-pressed") === "true" ? null : button.dataset.r;
    for (const other of buttons) other.setAttribute("aria-pressed", String(other.dataset.r === chosen));
    document.body.classList.toggle("single", chosen !== null);
    for (const item of document.querySelectorAll("main [data-r]")) {
      item.classList.toggle("off", chosen !== null && item.dataset.r !== chosen);
    }
  });
}
