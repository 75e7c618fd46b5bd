"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SHOWN = 40;
const make = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const ENDED = { stop: "ended", length: "stopped at the length limit", turns: "stopped after its last turn" };
const ended = (sample) => ENDED[sample.stop] ?? sample.stop;
const fixed = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(3));

const rewards = [...new Set(data.samples.flatMap((sample) => Object.keys(sample.rewards)))];
const sum = `${data.value}, sum`;
const MEASURES = { ...Object.fromEntries(rewards.map((name) => [name, (s) => s.rewards[name] ?? 0])), [sum]: (s) => s.sum, "length in tokens": (s) => s.length };
for (const sample of data.samples) {
  sample.text = sample.tokens.map((token) => token[0]).join("");
  sample.found = `${data.prompts[sample.prompt]}\n${sample.text}`.toLowerCase();
}

// Shades follow the values that are there: the strongest is that of the 98th of 100.
const sizes = data.samples.flatMap((s) => s.tokens.filter((t) => t.length > 1).map((t) => Math.abs(t[1]))).sort((a, b) => a - b);
const strongest = Math.max(sizes[Math.floor(0.98 * (sizes.length - 1))] || 0, 0.05);
const shade = (value) => `rgba(${value < 0 ? "217,101,28" : "47,111,222"},${(0.6 * Math.min(Math.abs(value) / strongest, 1)).toFixed(3)})`;

function options(select, values, first) {
  const all = first === undefined ? values : [first, ...values];
  select.replaceChildren(...all.map((value) => new Option(value, value)));
}
options($("iteration"), data.iterations, "all");
options($("sort"), ["iteration", ...Object.keys(MEASURES)]);
options($("term"), Object.keys(MEASURES));
options($("stop"), [...new Set(data.samples.map(ended))], "any");
$("order").value = "1";
$("facts").textContent = `${data.samples.length} samples of ${data.iterations.length} iterations` +
  (data.kept > data.iterations.length ? `, evenly of ${data.kept} that are kept` : "");
const legend = (value) => {
  const shown = make("span", "swatch", value.toFixed(2));
  shown.style.background = shade(value);
  return shown;
};
$("legend").append(`Shading: ${data.value} of each token, `, legend(-strongest), " to ", legend(strongest), ".");

function means(samples) {
  const table = make("table");
  const head = make("tr");
  head.append(...["iteration", "samples", ...Object.keys(MEASURES)].map((name) => make("th", "", name)));
  table.append(head);
  for (const iteration of data.iterations) {
    const own = samples.filter((sample) => sample.iteration === iteration);
    if (!own.length) continue;
    const row = make("tr");
    const mean = (measure) => own.reduce((total, sample) => total + measure(sample), 0) / own.length;
    row.append(...[iteration, own.length, ...Object.values(MEASURES).map((m) => mean(m).toFixed(3))].map((cell) => make("td", "num", String(cell))));
    table.append(row);
  }
  const folded = make("details");
  folded.append(make("summary", "", "means by iteration"), table);
  folded.open = Boolean($("means").querySelector("details")?.open);
  return folded;
}

// A pair that a person labels: the better and the worse answer of a group, by its key.
const labelled = new Map();
const groupOf = (sample) => `${sample.iteration} ${sample.prompt}`;
const pairs = () => [...labelled.values()].filter((pair) => pair.chosen && pair.rejected);

function marks(sample) {
  const row = make("div", "marks");
  for (const [side, name] of [["chosen", "better"], ["rejected", "worse"]]) {
    const button = make("button", side, name);
    button.type = "button";
    button.ariaPressed = String(labelled.get(groupOf(sample))?.[side] === sample);
    button.addEventListener("click", () => {
      const pair = labelled.get(groupOf(sample)) ?? {};
      const was = pair[side] === sample;
      for (const each of Object.keys(pair)) if (pair[each] === sample) delete pair[each];
      if (!was) pair[side] = sample;
      labelled.set(groupOf(sample), pair);
      for (const each of row.closest(".members").querySelectorAll(".marks")) each.replaceWith(marks(each.sample));
      $("save").hidden = pairs().length === 0;
      $("save").textContent = `save labelled pairs (${pairs().length})`;
    });
    row.append(button);
  }
  row.sample = sample;
  return row;
}

function lines() {
  const annotator = $("annotator").value.trim() || "annotator";
  const line = ({ chosen, rejected }) => JSON.stringify({ ...data.asked[chosen.prompt], chosen: chosen.answer, rejected: rejected.answer, annotator });
  return pairs().filter(({ chosen, rejected }) => chosen.answer !== rejected.answer).map((pair) => `${line(pair)}\n`).join("");
}

$("labelling").hidden = !data.asked;
$("save").addEventListener("click", () => {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/x-ndjson" }));
  link.download = "labelled.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
});

function member(sample) {
  const card = make("div", "member");
  const terms = make("div", "terms");
  terms.append(make("span", "", `${sample.length} tokens, ${ended(sample)}`));
  for (const [name, measure] of Object.entries(MEASURES)) {
    if (name === "length in tokens") continue;
    const term = make("span", "", `${name} `);
    term.append(make("b", "", fixed(measure(sample))));
    terms.append(term);
  }
  const written = make("div", "written");
  for (const [text, value] of sample.tokens) {
    const token = make("span", value === undefined ? "seen" : "", text);
    if (value !== undefined) {
      token.style.background = shade(value);
      token.title = `${data.value} ${value}`;
    }
    written.append(token);
  }
  card.append(terms, written);
  if (data.asked) card.append(marks(sample));
  return card;
}

function group(samples) {
  const card = make("section", "group");
  const prompt = make("div", "prompt");
  const of = samples.length > 1 ? `${samples.length} answers` : `draw ${samples[0].draw}`;
  prompt.append(make("span", "", data.prompts[samples[0].prompt]), make("span", "", `iteration ${samples[0].iteration}, ${of}`));
  const members = make("div", "members");
  members.append(...samples.map(member));
  card.append(prompt, members);
  return card;
}

const OF = {
  mean: (values) => values.reduce((total, value) => total + value, 0) / values.length,
  max: (values) => Math.max(...values),
  min: (values) => Math.min(...values),
  spread: (values) => Math.max(...values) - Math.min(...values),
};
let sorted = [];
let shown = 0;

function more() {
  $("groups").append(...sorted.slice(shown, shown + SHOWN).map(group));
  shown = Math.min(shown + SHOWN, sorted.length);
  $("more").hidden = shown === sorted.length;
  $("more").textContent = `more (${sorted.length - shown} groups)`;
}

function update() {
  const words = $("search").value.toLowerCase();
  const [iteration, stop, limit] = [$("iteration").value, $("stop").value, $("limit").value];
  const [measure, side] = [MEASURES[$("term").value], Number($("bound").value)];
  const kept = data.samples.filter((sample) =>
    (iteration === "all" || sample.iteration === Number(iteration)) &&
    (stop === "any" || ended(sample) === stop) &&
    (limit === "" || side * (measure(sample) - Number(limit)) >= 0) &&
    sample.found.includes(words));
  const groups = new Map();
  for (const sample of kept) {
    const key = `${sample.iteration} ${sample.prompt}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(sample);
  }
  const by = $("sort").value;
  const value = by === "iteration" ? (own) => own[0].iteration : (own) => OF[$("of").value](own.map(MEASURES[by]));
  const order = Number($("order").value);
  sorted = [...groups.values()].map((own) => [value(own), own]).sort((a, b) => order * (a[0] - b[0])).map((pair) => pair[1]);
  $("count").textContent = `${kept.length} samples in ${sorted.length} groups.`;
  $("means").replaceChildren(means(kept));
  $("groups").replaceChildren();
  shown = 0;
  more();
}

$("tools").addEventListener("input", update);
$("tools").addEventListener("submit", (event) => event.preventDefault());
$("more").addEventListener("click", more);
update();
