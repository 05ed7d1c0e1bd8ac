// How the study is drawn: plain JavaScript and SVG. study/page.py puts this file into the page, as a module.
//
//   1 the study   2 words and numbers   3 sets of facts   4 scales and labels   5 what is chosen   6 drawing
//   7 to 16 one part a view: verdict, trade-offs, models, tests, by attribute, dose and response, answers, layers, IDP,
//   how it was made   17 start
//
// Parts 1 to 4 need no page: tests/report.test.mjs runs them in Node. No string of the study is read as markup:
// elements are made by make(), text goes in as text.

// ----------------------------------------------------------------------------------------------------- 1. The study
// study/page.py says how study and answers became letters (embed) and what the tables of answers are (by_fact).

let study = { models: [], metrics: [], operations: [] }, models = [], facts = [];
let answers = new Map(), byId = new Map(), metrics = new Map(), operations = new Map();

export function load(given, tables) {
  study = given;
  models = study.models;
  facts = tables.facts.map(([split, person, attribute, question, gold]) =>
    ({ split, person, attribute, question, gold }));
  byId = new Map(models.map((m, i) => [m.id, Object.assign(m, { index: i })]));
  metrics = new Map(study.metrics.map(n => [n.name, n]));
  answers = new Map(tables.answered.map((id, k) => [id, {
    said: facts.map(({ gold }, i) => tables.said[i][k] ?? gold),
    right: bitsWhere(facts.length, i => tables.right[i][k]),
    logprob: tables.logprob.map(row => row[k]),
  }]));
  // An operation that is used but not listed (Compress and Compare's own examples have some) comes after the listed.
  const listed = study.operations.map(o => o.name), used = models.map(m => m.operation?.name).filter(Boolean);
  const unlisted = [...new Set(used)].filter(name => !listed.includes(name)).map(name => ({ name }));
  operations = new Map([...study.operations, ...unlisted].map((o, i) => [o.name, Object.assign(o, { index: i })]));
  // A model's name is its tag; where the same repair was made of several models, with the tag of what it was made from.
  const tags = models.map(m => m.tag || m.id);
  const labelOf = m => {
    const tag = tags[m.index], only = tags.indexOf(tag) === tags.lastIndexOf(tag);
    return only || !parent(m) ? tag : `${labelOf(parent(m))} + ${tag}`;
  };
  for (const m of models) m.label = labelOf(m);
  return { study, models, facts };
}
const parent = m => byId.get(m.base) || null;
const root = m => parent(m) ? root(parent(m)) : m;
const operationName = m => m.operation ? m.operation.name : m.kind === "control" ? "control" : "dense";
const rank = m => m.operation ? operations.get(m.operation.name).index : -1;
const children = m => models.filter(c => c.base === m.id);                           // in the order of the study
const descendants = m => children(m).flatMap(c => [c, ...descendants(c)]);

// What a model is: the study says it in `kind`; else its operation's `kind`; else the four repairs go by their names.
const REPAIRS = ["lora", "prompt", "prefix", "idp"];
function isRepaired(m) {
  if (m.kind) return m.kind === "repaired";
  if (!m.operation) return false;
  const kind = operations.get(m.operation.name).kind;
  return kind ? kind === "repair" : REPAIRS.includes(m.operation.name.toLowerCase());
}
const isControl = m => m.kind === "control" || (isRepaired(m) && parent(m) !== null && isControl(parent(m)));
const isCompressed = m => parent(m) !== null && !isRepaired(m) && !isControl(m);
const repairsOf = m => children(m).filter(isRepaired).flatMap(c => [c, ...repairsOf(c)]);
const repaired = m => isRepaired(m) && parent(m) ? repaired(parent(m)) : m;          // the model that was repaired
const family = m => [...new Set([root(m), m, ...repairsOf(m)])];
// Colour means one thing: grey what is known by construction (the dense model, the controls), blue compressed, orange
// repaired. Which of them it is, shape and name tell.
export const roleOf = m => isControl(m) || !parent(m) ? "dense" : isRepaired(m) ? "repaired" : "compressed";

// A measurement is a number, null (not measured), or words such as "not a number"; only numbers are drawn.
const own = (object, key) => object && Object.hasOwn(object, key) ? object[key] ?? null : null;
const number = v => typeof v === "number" ? v : null;
const numbers = list => list.filter(v => number(v) !== null);
const measured = (m, metric) => own(m.metrics, metric);
function interval(m, metric) {
  const ends = own(m.intervals, metric) || [];
  return numbers(ends).length === 2 ? ends : null;
}
// A share of what was lost has no interval where too little was lost to divide by: then its value says nothing.
const FRACTIONS = ["displaced", "relearned", "displaced_knowledge", "relearned_knowledge"];
const undivided = (m, metric) => FRACTIONS.includes(metric) && Object.hasOwn(m.metrics, metric) && !interval(m, metric)
  && (Object.hasOwn(m.intervals || {}, metric) || measured(m, metric) === null);
const value = (m, metric) => undivided(m, metric) ? null : number(measured(m, metric));

const answered = m => answers.has(m.id);
const rightOf = m => answers.get(m.id).right;
export const correct = (m, i) => has(rightOf(m), i);
export const logprob = (m, i) => answers.get(m.id).logprob[i];
export const answer = (m, i) => answers.get(m.id).said[i];
// How much likelier the right answer became, against the dense model, to a tenth as these are kept.
function gain(m, i) {
  const before = answered(root(m)) ? number(logprob(root(m), i)) : null, after = number(logprob(m, i));
  return before === null || after === null ? null : Math.round(10 * (after - before)) / 10;
}

// --------------------------------------------------------------------------------------------- 2. Words and numbers

const nameOf = metric => own(metrics.get(metric), "label") || metric;
const unitOf = metric => own(metrics.get(metric), "unit") || "";
const RECALLS = [["recall_heldout", "held-out recall"], ["recall_seen", "seen recall"],
  ["recall_novel", "novel recall"]];
const SHARES = [["displaced", "displaced"], ["relearned", "re-learned"]];
const spoken = name => ({ heldout: "held-out", lr: "learning rate" })[name] || name.replaceAll("_", " ");
const isShare = metric => unitOf(metric) === "share"
  || (unitOf(metric) === "" && (FRACTIONS.includes(metric) || RECALLS.some(([name]) => name === metric)));
const minus = text => text.replace(/^-/, "−");
const isZero = v => Math.abs(v) < 1e-9;                     // but for the rounding of a mean, which has no side
export const fixed = (v, digits) => minus((isZero(v) ? 0 : v).toFixed(digits));
// As many digits that no value reads as 0 unless it is 0: on which side of 0 an interval ends is what decides.
export function digitsFor(values, least) {
  let digits = least;
  while (digits < 6 && values.some(v => !isZero(v) && Number(v.toFixed(digits)) === 0)) digits++;
  return digits;
}
export function plain(v, digits = 3, least = 1) {
  if (v === null || v === undefined) return "not measured";
  if (typeof v !== "number") return String(v);
  if (v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e12)) return minus(v.toExponential(1)).replace("e-", "e−");
  const whole = Number.isInteger(v) || Math.abs(v) >= 10 ** digits;
  return minus(v.toLocaleString("en", whole ? { maximumFractionDigits: 0 }
    : { minimumSignificantDigits: least, maximumSignificantDigits: digits }));
}
const steady = v => plain(v, 3, 3);                         // 0.150 under 0.142, for columns of numbers
const two = v => typeof v === "number" ? fixed(v, 2) : plain(v);
const tenths = v => typeof v === "number" ? fixed(100 * v, digitsFor([100 * v], 1)) + " %" : plain(v);
const percent = v => typeof v === "number" ? fixed(100 * v, Math.abs(v) < 0.1 && v !== 0 ? 1 : 0) + " %" : plain(v);
export const signed = (v, digits = 2) => (isZero(v) ? "" : v > 0 ? "+" : "−") + Math.abs(v).toFixed(digits);
const count = (n, word) => `${plain(n)} ${word}${n === 1 ? "" : "s"}`;
const raised = digits => [...digits].map(d => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).join("");
export const probability = p => typeof p !== "number" ? plain(p) : p >= 0.001 ? minus(String(Number(p.toPrecision(2))))
  : p === 0 ? "< 10⁻³⁰⁰" : p.toExponential(0).replace(/e-(\d+)/, (_, power) => ` × 10⁻${raised(power)}`);

function bytes(v) {
  const power = Math.min(3, Math.floor(Math.log10(Math.max(Math.abs(v), 1)) / 3));
  return `${plain(v / 1000 ** power)} ${["B", "kB", "MB", "GB"][power]}`;
}
function seconds(s) {
  if (typeof s !== "number") return plain(s);
  return s < 100 ? `${plain(s)} s` : `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}
function show(metric, v) {
  if (typeof v !== "number") return plain(v);
  if (unitOf(metric) === "bytes") return bytes(v);
  if (isShare(metric)) return tenths(v);
  return plain(v) + (unitOf(metric) && unitOf(metric).length <= 4 ? ` ${unitOf(metric)}` : "");
}
const tick = (metric, v) => isShare(metric) ? `${plain(100 * v)} %` : show(metric, v);
export function shareRange([low, high]) {
  const digits = digitsFor([100 * low, 100 * high], 1);
  return `${fixed(100 * low, digits)} to ${fixed(100 * high, digits)}`;
}
const range = (metric, ends) => isShare(metric) ? shareRange(ends) : ends.map(v => show(metric, v)).join(" to ");
const TOO_LITTLE = "too little was lost to divide by";
function withInterval(m, metric) {
  if (undivided(m, metric)) return TOO_LITTLE;
  const ends = interval(m, metric);
  return show(metric, measured(m, metric)) + (ends ? ` (${range(metric, ends)})` : "");
}
function describe(m, list) {
  const lines = [...new Set(list)].filter(n => metrics.has(n)).map(n => `${nameOf(n)}: ${withInterval(m, n)}`);
  return [m.label, ...lines].join("\n");
}
function words(v) {
  if (v === null || typeof v !== "object") return v === null ? "none" : String(v);
  const inner = u => u !== null && typeof u === "object" ? `(${words(u)})` : words(u);
  if (Array.isArray(v)) return v.map(inner).join(", ") || "none";
  return Object.entries(v).map(([k, u]) => `${spoken(k)} ${inner(u)}`).join(", ") || "none";
}
// Among models that are shown together, a repair needs not name again what was repaired, if that is shown too.
const briefly = (m, shown) => isRepaired(m) && shown.includes(parent(m)) ? `+ ${m.tag || m.id}` : m.label;
const settingsOf = m => m.operation?.parameters ? words(m.operation.parameters) : "";

// The test that decides whether a repair is confirmed, and a sentence where the interval alone would say so.
const HELD_OUT = "recall, held-out";
const testOf = m => (study.comparisons || []).find(row => row.model === m.id && row.what === HELD_OUT);
export function differing(m) {
  const ends = interval(m, "displaced"), test = testOf(m), yes = own(m, "confirmed");
  if (!ends || yes === null) return "";
  const family = study.comparisons.filter(row => byId.get(row.model)?.group === m.group);  // corrected together
  const p = test ? `p ${probability(test.p_holm)} after correction for ${count(family.length, "test")}`
    : "the corrected test";
  if (!yes && ends[0] > 0) return `The interval lies above 0, but the gain is not confirmed: ${p}.`;
  return "";
}

// What is to be said of a repair beside its numbers: nothing, where a gain is confirmed and the interval says so too.
function remark(m) {
  const test = testOf(m), why = differing(m), yes = own(m, "confirmed");
  if (yes || yes === null || !interval(m, "displaced")) return yes === null ? m.verdict || "" : why;
  if (test && test.p_holm < 0.05) return "Held-out facts are lost further.";
  const lost = value(root(m), "recall_heldout") - value(parent(m), "recall_heldout");
  const share = test && number(test.detectable) !== null && lost > 0 ? test.detectable / lost : null;
  return [why || "No gain is shown.",
    share !== null && `A share of ${percent(share)} would be found four times in five.`].filter(Boolean).join(" ");
}

// ---------------------------------------------------------------------------------------------- 3. Sets of facts
// A set of facts is 32 facts a word: all flips between 41 models on 5,000 facts are counted in a few milliseconds.

export function bitsWhere(n, test) {
  const set = new Uint32Array(Math.ceil(n / 32));
  for (let i = 0; i < n; i++) if (test(i)) set[i >> 5] |= 1 << (i & 31);
  return set;
}
export const has = (set, i) => (set[i >> 5] >>> (i & 31) & 1) === 1;
export const and = (a, b) => a.map((v, k) => v & b[k]);
export const or = (a, b) => a.map((v, k) => v | b[k]);
export const without = (a, b) => a.map((v, k) => v & ~b[k]);
export function size(a, b = null, c = null) {               // of a, of a and b, of a and b without c; nothing is copied
  let n = 0;
  for (let k = 0; k < a.length; k++) {
    let v = a[k];
    if (b) v &= b[k];
    if (c) v &= ~c[k];
    v -= v >>> 1 & 0x55555555;
    v = (v & 0x33333333) + (v >>> 2 & 0x33333333);
    n += (v + (v >>> 4) & 0x0f0f0f0f) * 0x01010101 >>> 24;
  }
  return n;
}
export const listOf = set => [...facts.keys()].filter(i => has(set, i));

// Every filter is a question about one fact: what did the dense model, the compressed one and its repairs answer?
export function filters(c, shown, flipped = []) {
  const all = bitsWhere(facts.length, () => true), none = new Uint32Array(all.length);
  const dense = root(c), fixes = repairsOf(c).filter(answered), list = [["all", "all facts", all]];
  const any = some => some.map(rightOf).reduce(or, none), every = some => some.map(rightOf).reduce(and, all);
  if (shown.length > 1) list.push(["differ", "selected models disagree", without(any(shown), every(shown))]);
  if (c !== dense && answered(c) && answered(dense)) {
    const broken = without(rightOf(dense), rightOf(c)), names = [...new Set(fixes.map(operationName))];
    list.push(["broken", "broken by compression", broken],
      ["gained", "right only after compression", without(rightOf(c), rightOf(dense))]);
    if (fixes.length) list.push(["repaired", "repaired by any", and(broken, any(fixes))],
      ["lost", "repaired by none", without(broken, any(fixes))],
      ["new", "newly broken by a repair", without(rightOf(c), every(fixes))]);
    for (const name of names) {
      const these = fixes.filter(m => operationName(m) === name), others = fixes.filter(m => operationName(m) !== name);
      list.push([`by ${name}`, `repaired by ${name}`, and(broken, any(these))],
        [`only ${name}`, `repaired by ${name} only`, without(and(broken, any(these)), any(others))],
        [`new ${name}`, `newly broken by ${name}`, without(rightOf(c), every(these))]);
    }
  }
  const [one, other] = flipped;
  if (one && other && answered(one) && answered(other))
    list.push([`flip ${one.index} ${other.index}`, `${one.label} right, ${other.label} wrong`,
      without(rightOf(one), rightOf(other))]);
  return list.map(([key, words, set]) => ({ key, words, set }));
}
// The share of the facts that a model gets right, without those about people whom no text names: nobody can know them.
export function shareRight(m, list) {
  const knowable = list.filter(i => facts[i].split !== "novel");
  return knowable.length ? knowable.filter(i => correct(m, i)).length / knowable.length : null;
}

// ------------------------------------------------------------------------------------------- 4. Scales and labels

// From values to pixels. A scale knows its ticks; a logarithm puts what is 0 in a place of its own, left of the rest,
// and falls back to a plain scale where something is below 0.
export function scaleOf(values, [from, to], logarithmic = false) {
  const above = values.filter(v => v > 0), log = logarithmic && above.length > 0 && Math.min(...values) >= 0;
  const zero = log && above.length < values.length, way = Math.sign(to - from), start = zero ? from + way * 34 : from;
  const f = log ? Math.log10 : v => v, these = log ? above : values;
  let low = f(Math.min(...these)), high = f(Math.max(...these));
  const margin = high > low ? (high - low) * 0.07 : Math.abs(high) * 0.1 || 1;
  [low, high] = [low - margin, high + margin];
  const scale = v => zero && v <= 0 ? from + way * 12 : start + (f(v) - low) / (high - low) * (to - start);
  scale.invert = at => {
    const v = low + (at - start) / (to - start) * (high - low);
    return log ? 10 ** v : v;
  };
  scale.ticks = log ? decades(low, high) : steps(low, high);
  if (log && scale.ticks.length < 3) scale.ticks = steps(10 ** low, 10 ** high).filter(v => v > 0);
  if (zero) scale.ticks.unshift(0);
  return scale;
}
export function steps(low, high) {
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const able = power < 1 ? [1, 2, 2.5, 5] : [1, 2, 5], step = power * (able.find(s => s * power >= rough) || 10);
  const start = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - start + 1 },
    (_, k) => Number(((start + k) * step).toPrecision(12)));
}
function decades(low, high) {
  const powers = Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, k) => Math.floor(low) + k);
  const values = powers.flatMap(power => [1, 2, 5].map(s => Number((s * 10 ** power).toPrecision(3))));
  return values.filter(v => Math.log10(v) >= low && Math.log10(v) <= high);
}
// Names beside their points, in the order given. A name is put only where it is nearer to its own point than to any
// other, on no other name or point, on nothing `taken` and, if it can be, on no line; one that stands off has a leader.
// Else it gets none.
export function placeLabels(points, box, width, lines = [], taken = []) {
  const high = 13, leaders = [];
  const meets = (a, b) => a[0] < b[2] && a[2] > b[0] && a[1] < b[3] && a[3] > b[1];
  const within = (v, low, high) => Math.max(low, Math.min(high, v));
  const nearest = ([left, top, right, bottom], p) => [within(p.px, left, right), within(p.py, top, bottom)];
  const far = (place, p) => Math.hypot(nearest(place, p)[0] - p.px, nearest(place, p)[1] - p.py);
  const dots = points.map(p => [p.px - 8, p.py - 8, p.px + 8, p.py + 8]);
  const along = ([x0, y0, x1, y1]) => Array.from({ length: 12 }, (_, k) => {
    const x = x0 + (x1 - x0) * k / 11, y = y0 + (y1 - y0) * k / 11;
    return [x - 1, y - 1, x + 1, y + 1];
  });
  const angles = [0, 180, 270, 90, 315, 45, 225, 135, 337, 23, 203, 157, 292, 248, 68, 112].map(a => a * Math.PI / 180);
  // Where the name of p would lie, so far from its point in this direction; null where it may not.
  function candidate(p, w, distance, angle) {
    const r = p.r || 8, others = points.filter(q => q !== p);
    const x = p.px + Math.cos(angle) * (r + distance + w / 2);
    const y = p.py + Math.sin(angle) * (r + distance + high / 2);
    const place = [x - w / 2, y - high / 2, x + w / 2, y + high / 2], mine = far(place, p);
    if (place[0] < box.left || place[2] > box.right || place[1] < box.top || place[3] > box.bottom) return null;
    if ([...taken, ...dots, ...leaders].some(b => meets(place, b))) return null;
    if (others.some(q => far(place, q) < mine + 7)) return null;     // shapes are up to 3 off their middle
    const [nx, ny] = nearest(place, p);
    const leader = mine > r + 6 ? [p.px + (nx - p.px) * r / mine, p.py + (ny - p.py) * r / mine, nx, ny] : null;
    const crosses = spot => taken.some(b => meets(spot, b)) || others.some(q => far(spot, q) < 8);
    if (leader && along(leader).some(crosses)) return null;
    return { place, leader, cost: 3 * lines.filter(b => meets(place, b)).length + distance / 10 };
  }
  return points.map(p => {
    const w = width(p.label), found = [];
    for (const distance of [4, 12, 22, 34, 48, 64]) {
      found.push(...angles.map(angle => candidate(p, w, distance, angle)).filter(Boolean));
      if (found.some(f => f.cost < distance / 10 + 0.5)) break;                          // one that meets no line
    }
    const best = found.sort((a, b) => a.cost - b.cost)[0];
    if (!best) return null;
    const [left, top, right, bottom] = best.place;
    taken.push([left - 3, top, right + 3, bottom]);
    if (best.leader) leaders.push(...along(best.leader));
    return best;
  });
}
// Numbers along a line, pushed apart until each has `room`, as near to their wish as can be.
export function apart(wishes, room) {
  const order = wishes.map((y, k) => [y, k]).sort((a, b) => a[0] - b[0]), out = [];
  for (const [y, k] of order) out.push([Math.max(y, out.length ? out.at(-1)[0] + room : -Infinity), k]);
  const over = out.map(([y, k]) => y - wishes[k]), shift = over.reduce((a, b) => a + b, 0) / (over.length || 1);
  return wishes.map((_, k) => out.find(o => o[1] === k)[0] - shift);
}

// ------------------------------------------------------------------------------------------------- 5. What is chosen
// One object holds every choice. It is written into the address after "#", so that a link shows what you saw and Back
// goes back; choices that are at their default are left out.

let DEFAULTS = {}, chosen = {};

function defaults() {
  const known = (...names) => names.find(name => metrics.has(name)) ?? "";
  const first = study.metrics[0]?.name ?? "", last = study.metrics.at(-1)?.name ?? "";
  const usual = models.find(m => isCompressed(m) && repairsOf(m).length) || models.find(isCompressed) || models[0];
  const question = metrics.has("displaced") && metrics.has("extra_parameters")
    && models.some(m => value(m, "displaced") !== null && value(m, "extra_parameters") !== null);
  return {
    select: family(usual).map(m => m.id),                   // in every view: ids of the selected models
    colour: "operation", size: known("bytes") || first, several: "",                         // in the map
    x: question ? "extra_parameters" : known("bytes") || first,                              // in the trade-offs
    y: question ? "displaced" : known("recall_heldout") || last,
    logx: question ? "1" : "", logy: "", zoom: "", drag: "select",
    what: "", tasks: "", sweep: "", measure: "",            // in the tests, by attribute, the sweeps
    of: "", show: "all", split: "", q: "", sort: "", page: "1", change: "", from: "", to: "",   // in the answers
    layers: "", idp: "", view: "",
  };
}
function readHash() {
  const read = new URLSearchParams(location.hash.slice(1)), usual = DEFAULTS;
  chosen = { ...usual };
  for (const key of Object.keys(usual)) if (read.has(key)) chosen[key] = read.get(key);
  chosen.select = read.has("select") ? read.getAll("select").filter(id => byId.has(id)) : usual.select;
  for (const key of ["x", "y", "size"]) if (!metrics.has(chosen[key])) chosen[key] = usual[key];
  if (!metrics.has(chosen.colour)) chosen.colour = "operation";
}
function writeHash(replace = false) {
  const write = new URLSearchParams();
  const usualSelection = chosen.select.join("\n") === DEFAULTS.select.join("\n");
  if (!usualSelection) for (const id of chosen.select.length ? chosen.select : [""]) write.append("select", id);
  for (const [key, usually] of Object.entries(DEFAULTS))
    if (key !== "select" && chosen[key] !== usually) write.set(key, chosen[key]);
  const address = "#" + write;
  if (address === location.hash || (address === "#" && !location.hash)) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
}
function choose(changes, views = CHOSEN_VIEWS, replace = false) {
  chosen = { ...chosen, ...changes };
  writeHash(replace);
  draw(views);
}
const turn = changes => choose({ page: "1", ...changes }, ["behaviours"]);       // what only the table of facts shows

const selected = () => chosen.select.map(id => byId.get(id)).sort((a, b) => a.index - b.index);
const isSelected = m => chosen.select.includes(m.id);
const select = list => choose({ select: [...new Set(list.map(m => m.id))], of: "", page: "1" });
function click(m, event) {
  const several = event.shiftKey || event.ctrlKey || event.metaKey || chosen.several;
  if (!several) select([m]);
  else select(isSelected(m) ? selected().filter(s => s !== m) : [...selected(), m]);
}
// The compressed model in question: the one asked for, else that of the first selected model which has one.
function inQuestion() {
  const asked = byId.get(chosen.of), able = m => isCompressed(m) || m.kind === "control";
  if (asked && able(asked)) return asked;
  return selected().map(repaired).find(able) || byId.get(DEFAULTS.select[1]) || models[0];
}

// -------------------------------------------------------------------------------------------------------- 6. Drawing
// html("td.n", { title: "…" }, "text", another) makes an element; attributes may be left out; on… is a listener; null,
// undefined and false, as an attribute or as something inside, are skipped.

const nothing = v => v === null || v === undefined || v === false;
const make = create => (tag, ...rest) => {
  const [name, ...classes] = tag.split("."), node = create(name);
  const attributes = rest[0]?.constructor === Object ? rest.shift() : {};
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [key, v] of Object.entries(attributes)) {
    if (nothing(v)) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), v);
    else node.setAttribute(key, v === true ? "" : v);
  }
  node.append(...rest.flat(Infinity).filter(inside => !nothing(inside)));
  return node;
};
const html = make(name => document.createElement(name));
const svg = make(name => document.createElementNS("http://www.w3.org/2000/svg", name));
const line = (x1, y1, x2, y2, more) => svg("line", { x1, y1, x2, y2, ...more });
const rect = (x, y, width, height, more) => svg("rect", { x, y, width, height, ...more });
const path = (d, more) => svg("path", { d, ...more });
const text = (x, y, inside, more) => svg("text", { x, y, ...more }, inside);
const sized = (width, height) => ({ width, height, viewBox: `0 0 ${width} ${height}` });  // on paper it may shrink

const part = (view, inner) => document.querySelector(`#${view} ${inner}`);
const fill = (place, ...inside) => place.replaceChildren(...inside.flat(Infinity).filter(v => !nothing(v)));
const missing = (what, how = "") => html("p.missing", `${what}: not measured in this run.${how && " " + how}`);

let pageWidth = 0;                                          // of every figure; asked once: asking lays the page out
let pencil = null;
const widths = new Map();
function textWidth(string) {
  if (!pencil) {
    pencil = document.createElement("canvas").getContext("2d");
    pencil.font = `650 12px ${getComputedStyle(document.body).fontFamily}`;
  }
  if (!widths.has(string)) widths.set(string, pencil.measureText(string).width);
  return widths.get(string);
}
function shorten(string, width) {
  if (textWidth(string) <= width) return string;
  let keep = string.length;
  while (keep > 1 && textWidth(string.slice(0, keep) + "…") > width) keep--;
  return string.slice(0, keep) + "…";
}

// Each operation has one shape everywhere; shapes of one radius have the same area.
const LOOKS = { dense: "circle", control: "circle", quantize: "square", prune: "diamond", lora: "up", prompt: "down",
  prefix: "hexagon", idp: "star", biases: "pentagon", "bias correction": "diamond" };
function lookOf(name) {
  const known = n => own(LOOKS, n.toLowerCase()), names = [...operations.keys()], others = names.filter(n => !known(n));
  const free = Object.keys(SHAPES).filter(s => s !== "circle" && !names.some(n => known(n) === s));
  return known(name) || (free.length ? free : ["square"])[others.indexOf(name) % (free.length || 1)];
}
const colour = m => `var(--${roleOf(m)})`;
const SHAPES = {                                            // corners, and by how many degrees they are turned
  circle: [48, 0], square: [4, 45], diamond: [4, 0], up: [3, 0], down: [3, 180], hexagon: [6, 30], pentagon: [5, 0],
  star: [5, 0],
};
function shape(name, radius) {
  const kind = lookOf(name), [n, turned] = SHAPES[kind], star = kind === "star", corners = star ? 2 * n : n;
  const area = star ? n / 2 * Math.sin(Math.PI / n) : n / 2 * Math.sin(2 * Math.PI / n);          // at radius 1
  const outer = radius * Math.sqrt(Math.PI / area);
  const corner = k => {
    const angle = k / corners * 2 * Math.PI + (turned - 90) * Math.PI / 180, r = star && k % 2 ? outer / 2 : outer;
    return `${(r * Math.cos(angle)).toFixed(2)},${(r * Math.sin(angle)).toFixed(2)}`;
  };
  return "M" + Array.from({ length: corners }, (_, k) => corner(k)).join("L") + "Z";
}
function icon(m) {
  const [name, role] = typeof m === "string" ? [m, REPAIRS.includes(m.toLowerCase()) ? "repaired" : "compressed"]
    : [operationName(m), roleOf(m)];
  return svg("svg", { width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" },
    path(shape(name, 4.4), { fill: `var(--${role})` }));
}
const named = (m, name = m.label) => html("span.name", { "data-m": m.index }, icon(m), html("span", name));

// A node with data-hint shows its words beside the pointer or the focus; the same words are in the element's label or
// in the table behind. A node with data-m belongs to a model: all that belongs to it lights up together.
const hint = (node, string) => {
  node.setAttribute("data-hint", string);
  return node;
};
function openHint(node) {
  const box = document.getElementById("hint");
  box.textContent = node.getAttribute("data-hint");
  box.hidden = false;
  const at = node.getBoundingClientRect(), mine = box.getBoundingClientRect();
  const middle = Math.min(at.left + at.width / 2, at.left + 160), under = at.bottom + 8;
  box.style.left = `${Math.max(8, Math.min(innerWidth - mine.width - 8, middle - mine.width / 2))}px`;
  box.style.top = `${under + mine.height < innerHeight ? under : Math.max(8, at.top - mine.height - 8)}px`;
}
const closeHint = () => { document.getElementById("hint").hidden = true; };
function light(index) {
  for (const node of document.querySelectorAll(".lit")) node.classList.remove("lit");
  if (index !== null) for (const node of document.querySelectorAll(`[data-m="${index}"]`)) node.classList.add("lit");
}
function pressFlip(event) {                                 // one listener for all the numbers of the table of flips
  const [, a, b] = event.target.closest("button")?.id.match(/^flip-(\d+)-(\d+)$/) || [];
  if (a === undefined) return;
  turn({ show: `flip ${a} ${b}` });
  document.getElementById("behaviours").scrollIntoView();
}
function listenToPointer() {
  let lit = null;
  const over = event => {
    const told = event.target.closest?.("[data-hint]"), owned = event.target.closest?.("[data-m]");
    if (told) openHint(told);
    else closeHint();
    const index = owned ? owned.getAttribute("data-m") : null;
    if (index !== lit) light(lit = index);
  };
  document.addEventListener("pointerover", over);
  document.addEventListener("focusin", event => { if (event.target.matches(":focus-visible")) over(event); });
  document.addEventListener("focusout", closeHint);
  addEventListener("scroll", closeHint);
  addEventListener("keydown", event => { if (event.key === "Escape") closeHint(); });
}

function axes(box, x, y, xName, yName, xText, yText) {
  const room = Math.max(...x.ticks.map(t => textWidth(xText(t)))) + 14;
  let edge = -Infinity;
  const free = x.ticks.filter(t => {
    const fits = x(t) - edge >= room;
    if (fits) edge = x(t);
    return fits;
  });
  return [
    y.ticks.map(t => [line(box.left, y(t), box.right, y(t), { class: t === 0 ? "zero" : "rule" }),
      text(box.left - 8, y(t) + 4, yText(t), { class: "muted", "text-anchor": "end" })]),
    free.map(t => [line(x(t), box.bottom, x(t), box.bottom + 5, { class: "zero" }),
      text(x(t), box.bottom + 19, xText(t), { class: "muted", "text-anchor": "middle" })]),
    line(box.left, box.bottom, box.right, box.bottom, { class: "zero" }),
    text(box.right, box.bottom + 38, shorten(`${xName} →`, box.right), { class: "strong", "text-anchor": "end" }),
    text(0, 12, shorten(`↑ ${yName}`, box.right), { class: "strong" }),
  ];
}

// A strip is a small axis as wide as its cell, from `low` to `high`. estimate() puts a dot on it and, over the dot, the
// interval: so a narrow interval is seen too. What lies off the axis is an arrow at its edge.
const across = share => `${(100 * Math.max(0, Math.min(1, share))).toFixed(2)}%`;
const strip = (...inside) => svg("svg.strip", { width: "100%", height: 20, "aria-hidden": "true" }, inside);
const onAxis = (low, high) => v => (v - low) / (high - low);
function estimate(m, v, ends, axis, hollow = false) {
  const paint = { fill: hollow ? "var(--paper)" : colour(m), stroke: colour(m), "stroke-width": 1.6 };
  const at = axis(v), off = at < 0 || at > 1;
  const mark = off ? path(at > 1 ? "M0,-5L7,0L0,5Z" : "M0,-5L-7,0L0,5Z", paint) : svg("circle", { r: 3.8, ...paint });
  const cap = u => line(across(axis(u)), 6, across(axis(u)), 14, { class: "ci" });
  const wide = ends && axis(ends[1]) - axis(ends[0]) > 0.09;                // inside the dot, caps would only darken it
  return [
    svg("svg", { x: across(at), y: 10, overflow: "visible", class: "dot" }, mark),
    ends && line(across(axis(ends[0])), 10, across(axis(ends[1])), 10, { class: "ci" }),
    wide && ends.filter(u => axis(u) >= 0 && axis(u) <= 1).map(cap),
  ];
}
const ofHundred = v => v === 1 ? "100 %" : String(100 * v);
const ticksOf = (axis, values, label) => svg("svg.ticks", { width: "100%", height: 14, "aria-hidden": "true" },
  values.map(v => text(across(axis(v)), 11, label(v),
    { "text-anchor": axis(v) < 0.02 ? "start" : axis(v) > 0.98 ? "end" : "middle", class: "muted" })));
const rulesOf = (axis, values) => values.map(v => line(across(axis(v)), 1, across(axis(v)), 19, { class: "rule" }));

// A heat map is a table: numbers in cells, darker for more. Read aloud, it is still a table. Up to SWITCH the ink is
// that of a low cell, above it that of a high one: a browser test measures the contrast of every cell.
const SWITCH = 0.66;
function blend(share) {
  const high = (100 * Math.max(0, Math.min(1, share))).toFixed(1);
  return `color-mix(in oklab, var(--high) ${high}%, var(--low))`;
}
// A row that is `first` opens a group: a gap stands above it.
function heat({ corner = "", rows, cols, values, low, high, inside = plain, hints = () => null, first = [] }) {
  const cell = (v, i, j) => {
    if (number(v) === null) return html("td.missing", v === null ? "–" : v);
    const share = high > low ? (v - low) / (high - low) : 0;
    return html("td", { style: `background: ${blend(share)}; color: var(--${share > SWITCH ? "on-high" : "on-low"})`,
      "data-hint": hints(i, j) }, inside(v, i, j));
  };
  return html("div.scroll", { tabindex: 0, role: "group", "aria-label": corner || "heat map" }, html("table.heat",
    html("thead", html("tr", html(corner ? "th" : "td", { class: "corner" }, corner),
      cols.map(c => html("th", { scope: "col" }, c)))),
    html("tbody", rows.map((r, i) => html("tr", { class: first[i] ? "first" : null }, html("th", { scope: "row" }, r),
      values[i].map((v, j) => cell(v, i, j)))))));
}
const ramp = (low, high) => html("p.note.key", html("span", low), html("span.ramp"), html("span", high));
// The first column names the row; `texts` are the other columns that hold words, which begin under each other.
function table(label, head, rows, texts = []) {
  const kind = (tag, j) => !j || texts.includes(j) ? tag : `${tag}.n`;
  return html("div.scroll", { tabindex: 0, role: "group", "aria-label": label }, html("table",
    html("thead", html("tr", head.map((h, j) => html(kind("th", j), { scope: "col" }, h)))),
    html("tbody", rows.map(row => html("tr",
      row.map((c, j) => j ? html(kind("td", j), c) : html("th", { scope: "row" }, c)))))));
}
// The table behind a picture: made when it is opened, and open again after the next drawing.
const opened = new Set();
function behind(id, title, build) {
  const node = html("details", { id }, html("summary", title));
  node.addEventListener("toggle", () => {
    opened[node.open ? "add" : "delete"](id);
    if (node.open && node.children.length === 1) node.append(...[build()].flat());
  });
  node.open = opened.has(id);
  return node;
}

// A labelled <select>, made once; its options and its value are renewed at every drawing.
const pickers = new Map();
function picker(id, label, options, current, onpick) {
  if (!pickers.has(id)) pickers.set(id, html("label", label, html("select", { id })));
  const box = pickers.get(id).querySelector("select");
  fill(box, options.map(([v, string]) => html("option", { value: v }, string)));
  box.value = current;
  box.onchange = () => onpick(box.value);
  return pickers.get(id);
}
const metricOptions = () => study.metrics.map(n => [n.name, nameOf(n.name)]);
const modelOptions = list => list.map(m => [m.id, m.label]);
const button = (id, inside, onclick, disabled = false) =>
  html("button", { id, type: "button", onclick, disabled }, inside);

// --------------------------------------------------------------------------------------------------------- 7. Verdict

const LOW = -0.25, HIGH = 1.25, fraction = onAxis(LOW, HIGH), whole = onAxis(0, 1);

function drawVerdict() {
  const dense = models.filter(m => parent(m) === null && repairsOf(m).length && m.kind !== "control");
  const groups = [...models.filter(isCompressed), ...dense, ...models.filter(m => m.kind === "control")];
  const some = models.some(m => RECALLS.some(([n]) => measured(m, n) !== null));
  const { alone, behind_24_tokens: shifted } = study.context || {};
  const fold = (id, title, build) => pageWidth < 660 && behind(id, title, () => html("div", build()));    // long there
  const group = (c, k) => k && fold(`verdict-${c.index}`, titleOf(c), () => verdictOf(c)) || verdictOf(c);
  const knowledge = knowledgeTable();
  fill(part("verdict", "figure"), some && groups.length ? groups.map(group) : missing("Recall of facts"),
    knowledge && fold("verdict-knowledge", "Knowing apart from format", () => knowledge) || knowledge,
    study.context && html("p.note", "For comparison: 24 tokens of unrelated text in front of every question, and no "
      + `compression, take the dense model's held-out recall from ${tenths(alone)} to ${tenths(shifted)}.`));
}
const titleOf = c => isControl(c) ? `Control: ${c.label}` : c.label;
function verdictOf(c) {
  const rows = family(c), recalls = RECALLS.filter(([n]) => rows.some(m => measured(m, n) !== null));
  const shares = SHARES.filter(([n]) => rows.some(m => Object.hasOwn(m.metrics, n)));
  const head = (label, axis) => html("th", { scope: "col" }, label, ticksOf(axis, [0, 0.5, 1], ofHundred));
  const row = m => {
    const says = isRepaired(m) ? remark(m) : m.verdict;
    return [html("tr", { "data-m": m.index, class: says ? "said" : null },
      html("th", { scope: "row" }, named(m, m.tag || m.id)),
      shares.map(([metric, label]) => isRepaired(m) ? fractionCell(m, metric, label) : html("td.half.none")),
      recalls.map(([metric, label]) => recallCell(m, metric, label, c, m === rows[0]))),
    says && html("tr.says", html("td"), html("td", { colspan: recalls.length + shares.length }, says))];
  };
  return [html("h3", titleOf(c)),
    html("table.verdict.stack",
      html("thead", html("tr", html("th", { scope: "col" }, "model"),
        shares.map(([, label]) => head(label, fraction)), recalls.map(([, label]) => head(label, whole)))),
      html("tbody", rows.map(row)))];
}
// Recall: the bar is the model, the shaded band what the damage took, between the two rules of dense and compressed.
function recallCell(m, metric, label, compressed, first) {
  const v = value(m, metric), ends = interval(m, metric);
  const dense = value(root(m), metric), low = value(compressed, metric);
  const lost = dense !== null && low !== null && dense > low;
  return html("td.third", { "data-label": label }, html("span.v", show(metric, measured(m, metric))),
    ends && html("span.ends", range(metric, ends)),
    v !== null && strip(rulesOf(whole, [0, 0.5, 1]),
      lost && rect(across(low), 0, across(dense - low), 20, { class: "lost" }),
      rect(0, 8, across(v), 4, { fill: colour(m) }), estimate(m, v, ends, whole)),
    first && pageWidth < 660 && ticksOf(whole, [0, 0.5, 1], ofHundred));
}
function fractionCell(m, metric, label) {
  const v = value(m, metric), ends = interval(m, metric);
  const first = metric.startsWith("displaced");
  if (v === null) return html("td.half", { "data-label": label }, undivided(m, metric)
    ? html("span.missing", first ? TOO_LITTLE : "–") : show(metric, measured(m, metric)));
  const yes = metric === "displaced" ? own(m, "confirmed") : !ends || ends[0] > 0 || ends[1] < 0;
  return html("td.half", { "data-label": label }, html("span.v", tenths(v)), span(ends),
    strip(rulesOf(fraction, [0, 0.5, 1]), estimate(m, v, ends, fraction, yes === false)),
    pageWidth < 660 && ticksOf(fraction, [0, 0.5, 1], ofHundred));                      // there the head is hidden
}
// Recall asks for the answer in words; knowledge compares its probability with those of the other values, so that being
// asked in another form changes nothing. The rest of what a repair gains is format.
function knowledgeTable() {
  const told = m => value(m, "displaced_knowledge") !== null || value(m, "gain_knowledge") !== null;
  const rows = models.filter(m => isRepaired(m) && told(m));
  if (!rows.length) return null;
  const some = ([n]) => rows.some(m => value(m, n) !== null);
  const shares = [["displaced", "displaced, recall"], ["displaced_knowledge", "displaced, knowledge"],
    ["relearned_knowledge", "re-learned, knowledge"]].filter(some);
  const gains = [["gain_knowledge", "gain in knowledge, nats"], ["gain_format", "gain in format, nats"]].filter(some);
  const reach = numbers(rows.flatMap(m => gains.flatMap(([n]) => [value(m, n), ...(interval(m, n) || [])])));
  const low = Math.min(0, ...reach), high = Math.max(0, ...reach), margin = 0.05 * (high - low);
  const nats = onAxis(low - margin, high + margin);
  const ticks = steps(low, high).filter((_, k, all) => all.length < 5 || k % 2 === 0);
  const head = ([, label], axis, values, say) => html("th", { scope: "col" }, label, ticksOf(axis, values, say));
  const gain = (m, [n, label]) => {
    const v = value(m, n), ends = interval(m, n), digits = digitsFor([v || 0, ...(ends || [])], 2);
    return html("td.half", { "data-label": label }, html("span.v", v === null ? "–" : signed(v, digits)),
      ends && html("span.ends", ends.map(u => fixed(u, digits)).join(" to ")),
      v !== null && strip(rulesOf(nats, [0]), estimate(m, v, ends, nats, ends && ends[0] <= 0 && ends[1] >= 0)));
  };
  return [html("h3", "Knowing apart from format"),
    html("p.note", "Recall counts answers given in words. Knowledge is the log-probability of the right value among "
      + "the values of its attribute, so it does not change with how an answer is put. Gain: what the repair adds on "
      + "held-out people, in nats, split into knowledge and the rest, format."),
    html("table.verdict.stack", html("thead", html("tr", html("th", { scope: "col" }, "model"),
      shares.map(s => head(s, fraction, [0, 0.5, 1], ofHundred)), gains.map(g => head(g, nats, ticks, v => plain(v))))),
    html("tbody", rows.map((m, k) => [
      parent(m) !== parent(rows[k - 1] || m) || !k ? html("tr.break", html("th", { scope: "rowgroup",
        colspan: 1 + shares.length + gains.length }, named(parent(m)))) : null,
      html("tr", { "data-m": m.index }, html("th", { scope: "row" }, named(m, m.tag || m.id)),
        shares.map(([n, label]) => fractionCell(m, n, label)), gains.map(g => gain(m, g)))])))];
}

// ------------------------------------------------------------------------------------------------------ 8. Trade-offs

const goodness = metric => ({ true: 1, false: -1 })[own(metrics.get(metric), "higher_is_better")] || null;
// The models that no other beats on both axes, from the best on x to the best on y.
export function front(points, gx, gy) {
  if (!gx || !gy) return [];                                // which way is better was not said
  let best = -Infinity;
  return [...points].sort((a, b) => gx * (b.x - a.x) || gy * (b.y - a.y)).filter(p => {
    const better = gy * p.y > best;
    if (better) best = gy * p.y;
    return better;
  });
}
function drawTradeoffs() {
  const check = (key, label) => html("label.check",
    html("input", { id: `trade-${key}`, type: "checkbox", checked: Boolean(chosen[key]),
      onchange: event => choose({ [key]: event.target.checked ? "1" : "", zoom: "" }, ["tradeoffs"]) }), label);
  const drag = way => html("button", { id: `drag-${way}`, type: "button", "aria-pressed": String(chosen.drag === way),
    onclick: () => choose({ drag: way }, ["tradeoffs"]) }, `drag ${way}s`);
  fill(part("tradeoffs", ".controls"),
    picker("trade-x", "across", metricOptions(), chosen.x, v => choose({ x: v, zoom: "" }, ["tradeoffs"])),
    picker("trade-y", "up", metricOptions(), chosen.y, v => choose({ y: v, zoom: "" }, ["tradeoffs"])),
    check("logx", "logarithm across"), check("logy", "logarithm up"),
    html("div.group", { role: "group", "aria-label": "What dragging does" }, drag("select"), drag("zoom"),
      button("zoom-out", "whole picture", () => choose({ zoom: "" }, ["tradeoffs"]), !chosen.zoom)));
  const both = models.filter(m => value(m, chosen.x) !== null && value(m, chosen.y) !== null);
  // Where all selected repairs are of one model, the note below says which, and their names are short.
  const bases = [...new Set(selected().filter(isRepaired).map(parent))], base = bases.length === 1 && bases[0];
  const nameIn = m => base && isSelected(m) && parent(m) === base ? m.tag || m.id : m.label;
  const points = both.map(m => ({ m, label: nameIn(m), x: value(m, chosen.x), y: value(m, chosen.y) }));
  if (!points.length) {
    fill(part("tradeoffs", "figure"), missing(`${nameOf(chosen.x)} with ${nameOf(chosen.y)}`));
    fill(part("tradeoffs", ".behind"));
    return;
  }
  const rivals = points.filter(p => !isControl(p.m));       // damage by construction competes with nothing
  const best = front(rivals, goodness(chosen.x), goodness(chosen.y));
  const kinds = [...new Map(both.map(m => [`${roleOf(m)} ${operationName(m)}`, m])).values()];
  const kindOf = m => operationName(m) + (isControl(m) && isRepaired(m) ? ", of a control" : "");
  fill(part("tradeoffs", "figure"), scatter(points, best),
    html("ul.keys", kinds.map(m => html("li.key", icon(m), kindOf(m)))),
    unnamed(points, base), absent(both));
  fill(part("tradeoffs", ".behind"), behind("trade-table", "The picture as a table", () => table("Trade-offs",
    ["model", nameOf(chosen.x), nameOf(chosen.y), "on the front"],
    points.map(p => [p.m.label, withInterval(p.m, chosen.x), withInterval(p.m, chosen.y),
      best.includes(p) ? "yes" : ""]))));
}
function unnamed(points, base) {
  const drawn = points.filter(p => p.named !== undefined), without = drawn.filter(p => !p.named), n = without.length;
  const rings = drawn.filter(p => isSelected(p.m)).sort((a, b) => a.px - b.px).map(p => p.label);
  const short = base && points.some(p => p.label !== p.m.label);
  const whose = short ? `the selected repairs of ${base.label}` : "the selected";
  const listed = without.some(p => isSelected(p.m)) && rings.length < 12;
  const said = [rings.length > 0 && `Ringed: ${whose}${listed ? `, from left to right ${rings.join("; ")}` : ""}.`,
    chosen.y === "displaced" && "Hollow: the corrected test does not confirm a gain.",
    tied(drawn) && "Models of nearly the same value across stand side by side.",
    n > 0 && `${count(n, "point")} without a name, for want of room: touch one, or zoom in.`].filter(Boolean);
  return said.length > 0 && html("p.note", said.join(" "));
}
// Which models are not in the picture, and why.
function absent(both) {
  const left = models.filter(m => !both.includes(m)), names = list => list.map(m => m.label).join("; ");
  const little = left.filter(m => [chosen.x, chosen.y].some(n => undivided(m, n)));
  const other = left.filter(m => !little.includes(m));
  const lacking = n => nameOf(n) + (FRACTIONS.includes(n) ? " (they are no repairs)" : "");
  const without = [chosen.x, chosen.y].filter(n => other.some(m => value(m, n) === null));
  const what = without.map(lacking).join(" or ");
  return [other.length > 0 && html("p.note", `Not shown, without ${what}: ${names(other)}.`),
    little.length > 0 && html("p.note", `Not shown, since ${TOO_LITTLE}: ${names(little)}.`)];
}
function scatter(points, best) {
  const width = pageWidth, height = width < 660 ? 480 : Math.min(560, width * 0.5);
  const zoom = chosen.zoom ? chosen.zoom.split(" ").map(Number) : null;
  // A share far outside, which a small denominator makes, would flatten all others: it becomes an arrow at the edge.
  const hold = (metric, v) => isShare(metric) ? Math.max(-0.5, Math.min(1.5, v)) : v;
  const spread = (metric, k) => zoom?.length === 4 ? zoom.slice(2 * k, 2 * k + 2)
    : points.flatMap(p => [value(p.m, metric), ...(interval(p.m, metric) || [])].map(v => hold(metric, v)));
  const y = scaleOf(spread(chosen.y, 1), [height - 50, 30], Boolean(chosen.logy));
  const left = Math.max(...y.ticks.map(t => textWidth(tick(chosen.y, t)))) + 14;
  const box = { left, right: width - 10, top: 24, bottom: height - 50 };
  const x = scaleOf(spread(chosen.x, 0), [left, box.right], Boolean(chosen.logx));
  for (const p of points) {
    [p.px, p.py] = [x(hold(chosen.x, p.x)), y(hold(chosen.y, p.y))];
    p.off = hold(chosen.y, p.y) !== p.y || hold(chosen.x, p.x) !== p.x;
    p.flat = interval(p.m, chosen.x)?.map(v => x(hold(chosen.x, v)));
    p.high = interval(p.m, chosen.y)?.map(v => y(hold(chosen.y, v)));
  }
  const seen = p => p.px >= left && p.px <= box.right && p.py >= box.top && p.py <= box.bottom;
  const here = zoom ? points.filter(seen) : points, side = tied(here);
  if (side) spreadOut(here, box, zoom ? 60 : 14);
  const stairs = best.filter(p => here.includes(p));
  const steps = stairs.map((p, k) => k ? `H${p.px}V${p.py}` : `M${p.px},${p.py}`).join("");
  const inWidth = v => Math.max(left, Math.min(box.right, v));
  const inHeight = v => Math.max(box.top, Math.min(box.bottom, v));
  const marked = m => isSelected(m) ? "g.bars.on" : "g.bars";
  const bars = here.map(({ m, px, py, flat, high }) => svg(marked(m), { "data-m": m.index },
    flat && line(inWidth(flat[0]), py, inWidth(flat[1]), py),
    high && [line(px, inHeight(high[0]), px, inHeight(high[1])),
      high.filter(v => v === inHeight(v)).map(v => line(px - 4, v, px + 4, v))]));
  const dotted = origins(here).map(([from, to]) => line(from.px, from.py, to.px, to.py,
    { stroke: colour(to.m), "stroke-dasharray": "1 3", "stroke-linecap": "round", "stroke-width": 1.5 }));
  const order = [...here].sort((a, b) => isSelected(a.m) - isSelected(b.m));
  const canvas = svg("svg", { ...sized(width, height), role: "group", style: "touch-action: pan-y",
    "aria-label": `${nameOf(chosen.y)} against ${nameOf(chosen.x)}, ${count(here.length, "model")}` },
    rect(left, box.top, box.right - left, box.bottom - box.top, { fill: "transparent" }),
    axes(box, x, y, nameOf(chosen.x), nameOf(chosen.y), t => tick(chosen.x, t), t => tick(chosen.y, t)),
    path(steps, { id: "front", fill: "none", stroke: "var(--muted)", "stroke-width": 1.2 }),
    dotted, labels(here, stairs, box, y.ticks.map(t => [left - 10 - textWidth(tick(chosen.y, t)), y(t) - 9, left - 4,
      y(t) + 8])), order.map(dot), bars);
  brush(canvas, box, last => {
    const caught = here.filter(p => p.px >= last.left && p.px <= last.right && p.py >= last.top && p.py <= last.bottom);
    if (chosen.drag === "zoom") {                           // points that stand side by side are not at their values
      const xs = side && caught.length ? caught.map(p => p.x) : [x.invert(last.left), x.invert(last.right)];
      const ends = [Math.min(...xs), Math.max(...xs), y.invert(last.bottom), y.invert(last.top)];
      choose({ zoom: ends.map(v => Number(v.toPrecision(5))).join(" ") }, ["tradeoffs"]);
      return;
    }
    select([...(last.shift || chosen.several ? selected() : []), ...caught.map(p => p.m)]);
  });
  return canvas;
}
// Where most models share their value across with another, as repairs of one size do, those of nearly the same value
// stand side by side: groups that would overlap become one, in the order of their values.
const tied = points => 2 * points.filter(p => points.some(q => q !== p && q.x === p.x)).length > points.length;
export function spreadOut(points, { left, right }, widest = 14) {
  const step = Math.min(widest, (widest > 14 ? 0.9 : 0.5) * (right - left) / points.length);
  const half = g => (g.length - 1) / 2 * step;
  const middle = g => g.reduce((sum, p) => sum + p.px, 0) / g.length;
  const groups = [];
  for (const p of [...points].sort((a, b) => a.px - b.px)) {
    groups.push([p]);
    while (groups.length > 1) {
      const [a, b] = groups.slice(-2);
      if (middle(b) - middle(a) >= half(a) + half(b) + step) break;
      groups.splice(-2, 2, [...a, ...b]);
    }
  }
  for (const g of groups) {
    const at = Math.max(left + half(g) + 6, Math.min(right - half(g) - 6, middle(g)));
    g.map((_, i) => at + (i - (g.length - 1) / 2) * step).forEach((px, i) => { g[i].px = px; });
  }
}
// Where a selected model came from: [the model it was made from, itself], when both are selected.
function origins(points) {
  const here = points.filter(p => isSelected(p.m));
  return here.map(p => [here.find(q => q.m === parent(p.m)), p]).filter(([from]) => from);
}
function dot({ m, px, py, off, y }) {
  const said = describe(m, [chosen.x, chosen.y]), on = isSelected(m);
  const hollow = chosen.y === "displaced" && own(m, "confirmed") === false;
  const press = event => {
    if (event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    click(m, event);
  };
  const mark = off ? (y < 0 ? "M0,-6V5M-4,1L0,5L4,1" : "M0,6V-5M-4,-1L0,-5L4,-1") : shape(operationName(m), 5);
  return hint(svg("g.pick", { id: `dot-${m.index}`, "data-m": m.index, tabindex: 0, role: "button",
    "aria-pressed": String(on), "aria-label": said.replaceAll("\n", "; "), transform: `translate(${px} ${py})`,
    onclick: event => click(m, event), onkeydown: press },
    svg("circle.ring", { r: 12, fill: on ? "var(--tint)" : "transparent", stroke: on ? "var(--ink)" : "none",
      "stroke-width": 1.2 }),
    path(mark, { class: "mark", fill: off ? "none" : hollow ? "var(--paper)" : colour(m), stroke: colour(m),
      "stroke-width": off ? 2.2 : 1.5 })),
  said);
}
// The selected are named first, then the front, then the rest; one without room is left to the hint, and said.
function labels(points, best, box, ticks) {
  const stairs = best.slice(1).flatMap((b, k) => {
    const a = best[k];
    return [[Math.min(a.px, b.px), a.py - 1, Math.max(a.px, b.px), a.py + 1],
      [b.px - 1, Math.min(a.py, b.py), b.px + 1, Math.max(a.py, b.py)]];
  });
  const bars = points.flatMap(({ px, py, flat, high }) => [
    flat && [flat[0], py - 1, flat[1], py + 1], high && [px - 1, high[1], px + 1, high[0]]].filter(Boolean));
  const order = [...points].sort((a, b) => isSelected(b.m) - isSelected(a.m) || best.includes(b) - best.includes(a));
  for (const p of order) p.r = isSelected(p.m) ? 13 : 8;
  const room = { ...box, left: 0, right: box.right + 6 };
  const placed = placeLabels(order, room, textWidth, [...stairs, ...bars], ticks);
  order.forEach((p, k) => { p.named = placed[k] !== null; });
  return placed.map((found, k) => {
    const { m, label } = order[k], side = found && beside(found, order[k]), on = isSelected(m);
    return found && svg("g.label", { "data-of": m.index, "data-m": m.index },
      found.leader && line(...found.leader, { class: "leader" }),
      text(found.place[side], found.place[3] - 2, label,
        { class: on ? "halo strong" : "halo muted", "text-anchor": side ? "end" : null }));
  });
}
// A name left of its point ends there (index 2 of its place), one right of it begins there (index 0).
const beside = ({ place }, p) => (place[0] + place[2]) / 2 < p.px - 1 ? 2 : 0;
// Dragging over an empty place draws a box; `done` gets its edges.
function brush(canvas, box, done) {
  const area = rect(0, 0, 0, 0, { class: "brush", "pointer-events": "none" });
  let start = null, drawn = null;
  const place = event => {
    const at = canvas.getBoundingClientRect();
    return [Math.max(box.left, Math.min(box.right, event.clientX - at.left)),
      Math.max(box.top, Math.min(box.bottom, event.clientY - at.top))];
  };
  canvas.addEventListener("pointerdown", event => {
    if (event.target.closest(".pick")) return;
    start = place(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", event => {
    if (!start) return;
    const [x, y] = place(event);
    drawn = { left: Math.min(x, start[0]), right: Math.max(x, start[0]), top: Math.min(y, start[1]),
      bottom: Math.max(y, start[1]) };
    const now = { x: drawn.left, y: drawn.top, width: drawn.right - drawn.left, height: drawn.bottom - drawn.top };
    for (const [key, v] of Object.entries(now)) area.setAttribute(key, v);
    canvas.append(area);
  });
  const stop = event => {
    const last = drawn;
    start = drawn = null;
    area.remove();
    if (event.type === "pointercancel" || !last || (last.right - last.left < 4 && last.bottom - last.top < 4)) return;
    done({ ...last, shift: event.shiftKey });
  };
  canvas.addEventListener("pointerup", stop);
  canvas.addEventListener("pointercancel", stop);
}

// --------------------------------------------------------------------------------------------------------- 9. Models
// Depth first, one row a model; one column for each depth and operation. So an edge never runs to the left, and a label
// never meets another one or an edge.

let reached = 0;                                            // the row that the tab key reaches; arrows move it

function mapRows() {
  const rows = [];
  const walk = (m, depth) => {
    rows.push({ m, depth, column: `${depth} ${rank(m)}` });
    children(m).forEach(c => walk(c, depth + 1));
  };
  models.filter(m => parent(m) === null).forEach(m => walk(m, 0));
  const columns = [...new Map(rows.map(r => [r.column, r])).values()];
  return { rows, columns: columns.sort((a, b) => a.depth - b.depth || rank(a.m) - rank(b.m)) };
}
function extent(metric) {
  const values = numbers(models.map(m => value(m, metric))), low = Math.min(...values), high = Math.max(...values);
  return { low, high, some: values.length > 0, share: v => high > low ? (v - low) / (high - low) : 0.5 };
}
// Where everything goes: the tree on the left, one or two measurements as numbers and bars on the right.
function mapPlan({ rows, columns }) {
  const width = pageWidth, narrow = width < 640;
  const step = Math.min(84, Math.max(15, width * (narrow ? 0.38 : 0.46) / columns.length));
  const tilted = columns.some(c => textWidth(operationName(c.m)) > step - 6), crowded = tilted && step < 19;
  const top = tilted && !crowded ? 84 : 30;                 // tilted heads 19 apart are as far apart as lines of text
  const x = new Map(columns.map((c, j) => [c.column, 18 + j * step])), spots = new Map();
  let y = top - 14;
  for (const r of rows) spots.set(r.m, [x.get(r.column), y += r.depth < 2 ? 34 : 26]);        // air between families
  const usual = metrics.has("recall_heldout") ? "recall_heldout" : chosen.y;
  const painted = chosen.colour === "operation" ? usual : chosen.colour;
  const shown = [...new Set(width < 900 ? [painted] : [chosen.size, painted])].filter(n => metrics.has(n));
  const wide = narrow ? 62 : 190, sizes = extent(chosen.size), biggest = Math.min(10, step * 0.44);
  const radius = m => value(m, chosen.size) === null ? 4
    : biggest * Math.sqrt(0.16 + 0.84 * sizes.share(value(m, chosen.size)));
  return { width, height: y + 16, narrow, top, tilted, crowded, x: c => x.get(c.column), spot: m => spots.get(m),
    radius, painted, shown, wide, edge: width - shown.length * wide, colours: extent(painted), sizes };
}
function drawMap() {
  drawMapControls();
  const all = mapRows(), plan = mapPlan(all), { width, height, top, tilted, spot, narrow, edge, wide } = plan;
  const heads = plan.crowded ? [] : all.columns.map((c, j) => svg("text.muted", {
    "text-anchor": tilted || j === 0 ? "start" : "middle",
    transform: `translate(${tilted || j ? plan.x(c) : 2} ${top - 10})` + (tilted ? " rotate(-45)" : "") },
    shorten(operationName(c.m), 112)));
  const titles = plan.shown.map((n, j) => text(edge + (j + 1) * wide - (narrow ? 0 : 100), top - 10,
    shorten(nameOf(n), narrow ? 110 : 150), { class: "muted", "text-anchor": "end" }));
  const both = m => isSelected(m) && isSelected(parent(m));
  const edges = all.rows.map(r => r.m).filter(parent).sort((a, b) => both(a) - both(b)).map(m => {
    const [x0, y0] = spot(parent(m)), [x1, y1] = spot(m);
    return path(`M${x0},${y0}V${y1 - 8}Q${x0},${y1} ${x0 + 8},${y1}H${x1}`,
      { fill: "none", stroke: `var(--${both(m) ? "muted" : "edge"})`, "stroke-width": 1.3 });
  });
  reached = Math.min(reached, all.rows.length - 1);
  fill(part("map", "figure"),
    svg("svg", { ...sized(width, height), role: "tree", "aria-label": "Models, each under the one it was made from",
      "aria-multiselectable": "true", onkeydown: event => mapKey(event, all.rows) },
      all.rows.map(({ m }) => rect(0, spot(m)[1] - 13, width, 26,
        { rx: 5, class: isSelected(m) ? "band on" : "band", "data-m": m.index })),
      heads, titles, edges, all.rows.map((r, i) => mapNode(r, i, plan))),
    html("ul.keys", mapKeys(plan)));
  fill(part("map", ".behind"), behind("map-table", "Every measurement as a table", () => table("Every measurement",
    ["model", "made by", ...study.metrics.map(n => nameOf(n.name))],
    models.map(m => [m.label, [operationName(m), settingsOf(m)].filter(Boolean).join(": "),
      ...study.metrics.map(n => withInterval(m, n.name))]))));
  fill(part("map", ".differences"), differences());
}
function drawMapControls() {
  const list = selected(), above = m => parent(m) ? [parent(m)] : [];
  const more = (id, relation) => button(`add-${id}`, `+ ${id}`, () => select([...list, ...list.flatMap(relation)]),
    list.flatMap(relation).every(isSelected));
  fill(part("map", ".controls"),
    picker("map-colour", "colour", [["operation", "dense, compressed, repaired"], ...metricOptions()], chosen.colour,
      v => choose({ colour: v }, ["map"])),
    picker("map-size", "size", metricOptions(), chosen.size, v => choose({ size: v }, ["map"])),
    html("div.group", { role: "group", "aria-label": "Add to the selection" }, more("parents", above),
      more("children", children), more("descendants", descendants), button("add-all", "all", () => select(models))),
    html("button", { id: "several", type: "button", "aria-pressed": String(Boolean(chosen.several)),
      onclick: () => choose({ several: chosen.several ? "" : "1" }, ["map"]) }, "click adds"));
}
function mapKeys({ painted, colours, sizes }) {
  const { colour: by, size } = chosen;
  return [
    by !== "operation" && (colours.some ? html("li.key", `colour: ${nameOf(painted)} ${show(painted, colours.low)}`,
      html("span.ramp"), show(painted, colours.high)) : html("li", missing(nameOf(painted)))),
    sizes.some && html("li", `area: ${nameOf(size)}, ${show(size, sizes.low)} to ${show(size, sizes.high)}`)];
}
function mapNode({ m, depth }, i, { spot, radius, painted, colours, shown, wide, edge, width, narrow }) {
  const [cx, cy] = spot(m), r = radius(m), start = cx + r + 9, place = `translate(${cx} ${cy})`, v = value(m, painted);
  const paint = chosen.colour === "operation" ? { fill: colour(m) }
    : v === null ? { fill: "none", stroke: "var(--muted)", "stroke-dasharray": "2 2" }
    : { fill: blend(colours.share(v)), stroke: "var(--muted)" };
  // Where there is little room, the model above need not be named again.
  const above = `${parent(m)?.label} `, room = edge - start - 8;
  const short = (narrow || textWidth(m.label) > room) && m.label.startsWith(`${above}+ `);
  const label = short ? m.label.slice(above.length) : m.label;
  const said = describe(m, [chosen.size, painted]);
  const node = svg("g.pick", { id: `map-${m.index}`, "data-m": m.index, role: "treeitem", "aria-level": depth + 1,
    "aria-selected": String(isSelected(m)), "aria-description": said.replaceAll("\n", "; "),
    tabindex: i === reached ? 0 : -1,
    onclick: event => { reached = i; click(m, event); } },
    rect(1, cy - 13, width - 2, 26, { class: "ring", rx: 5, fill: "transparent" }),
    isSelected(m) && path(shape(operationName(m), r + 3),
      { transform: place, fill: "var(--paper)", stroke: "var(--ink)", "stroke-width": 1.5 }),
    path(shape(operationName(m), r), { transform: place, class: "mark", ...paint }),
    text(start, cy + 4, shorten(label, room), { class: isSelected(m) ? "strong" : null }),
    shown.map((n, j) => mapCell(m, n, edge + j * wide, cy, narrow ? wide : wide - 100, narrow)));
  return hint(node, [said, settingsOf(m)].filter(Boolean).join("\n"));
}
function mapCell(m, metric, left, cy, room, narrow) {
  const v = value(m, metric), lacking = measured(m, metric) === null || undivided(m, metric);
  const string = lacking ? "–" : show(metric, measured(m, metric));
  const words = text(left + room, cy + 4, string, { "text-anchor": "end", class: v === null ? "muted" : null });
  if (narrow || v === null) return words;
  const most = Math.max(isShare(metric) ? 1 : 0,
    ...numbers(models.flatMap(o => [measured(o, metric), ...(interval(o, metric) || [])])));
  const long = u => most > 0 ? 84 * Math.max(0, Math.min(1, u / most)) : 0, at = left + room + 10,
    ends = interval(m, metric);
  return [words, rect(at, cy - 4, 84, 8, { fill: "var(--panel)" }),
    rect(at, cy - 3, long(v), 6, { fill: colour(m) }),
    ends && [line(at + long(ends[0]), cy, at + long(ends[1]), cy, { class: "ci" }),
      ends.map(u => line(at + long(u), cy - 4, at + long(u), cy + 4, { class: "ci" }))]];
}
function mapKey(event, rows) {
  const here = rows[reached].m, row = m => rows.findIndex(r => r.m === m);
  const goal = { ArrowDown: reached + 1, ArrowUp: reached - 1, Home: 0, End: rows.length - 1,
    ArrowLeft: row(parent(here)), ArrowRight: row(children(here)[0]) }[event.key];
  if (goal !== undefined) {
    document.getElementById(`map-${here.index}`).setAttribute("tabindex", -1);
    if (rows[goal]) reached = goal;
    const next = document.getElementById(`map-${rows[reached].m.index}`);
    next.setAttribute("tabindex", 0);
    next.focus();
  } else if (event.key === " " || event.key === "Enter") click(here, event);
  else return;
  event.preventDefault();
}
// A row a selected model, a column for each setting and measurement in which they are not all alike.
function differences() {
  const list = selected();
  if (list.length < 2) return html("p.missing", "Select two models or more to see what differs.");
  const keys = [...new Set(list.flatMap(m => Object.keys(m.operation?.parameters || {})))];
  const lacks = (m, metric) => measured(m, metric) === null && !undivided(m, metric);
  const columns = [["made from", m => parent(m)?.label ?? "nothing"], ["by", operationName],
    ...keys.map(key => [spoken(key), m => words(own(m.operation?.parameters, key) ?? "–")]),
    ...study.metrics.map(n => [nameOf(n.name), m => lacks(m, n.name) ? "–" : withInterval(m, n.name)])];
  const differ = columns.map(([name, of]) => [name, list.map(of)]).filter(([, row]) => new Set(row).size > 1);
  const same = columns.filter(([name]) => !differ.some(d => d[0] === name)).map(([name]) => name);
  return [table("What differs", ["model", ...differ.map(([name]) => name)],
    list.map((m, i) => [named(m, briefly(m, list)), ...differ.map(([, row]) => row[i])])),
  same.length > 0 && html("p.note", `The same in all: ${same.join(", ")}.`)];
}

// ---------------------------------------------------------------------------------------------------------- 10. Tests

function drawTests() {
  const rows = study.comparisons || [], noise = study.noise || [], kinds = [...new Set(rows.map(row => row.what))];
  const usual = kinds.includes(HELD_OUT) ? HELD_OUT : kinds[0];
  const what = kinds.includes(chosen.what) || chosen.what === "any" ? chosen.what : usual;
  const options = [...kinds.map(k => [k, k]), ["any", `all ${rows.length} comparisons`]];
  fill(part("tests", ".controls"),
    kinds.length > 0 && picker("tests-what", "measured on", options, what, v => choose({ what: v }, ["tests"])));
  fill(part("tests", ".pairs"), claimTable(), pairTable());
  const shown = rows.filter(row => what === "any" || row.what === what);
  fill(part("tests", "figure"), rows.length ? testTable(shown, noise, what) : missing("Comparisons"));
}
const points = v => typeof v === "number" ? signed(100 * v, 1) : plain(v);              // a share as percentage points
const span = ends => numbers(ends || []).length === 2 && html("span.ends", shareRange(ends));
const heads = (first, ...others) => html("thead", html("tr", html("th", { scope: "col" }, first),
  others.map(inside => html(Array.isArray(inside) ? "th" : "th.n", { scope: "col" }, inside))));

function testTable(shown, noise, what) {
  // Repairs of compressions bring back less than was taken: the axis is theirs, and what lies beyond an arrow.
  const repairs = shown.map(row => [byId.get(row.model), row]).filter(([m]) => m && isRepaired(m) && !isControl(m))
    .map(([, row]) => row);
  const scaled = repairs.length ? repairs : shown, sizes = scaled.flatMap(row => [row.difference, row.detectable]);
  const far = 1.06 * Math.max(0.01, ...numbers([...sizes, ...noise.map(row => row.difference)]).map(Math.abs));
  const axis = onAxis(-far, far), floor = Math.max(0, ...noise.map(row => Math.abs(row.difference)));
  const even = steps(0, far).at(-1), said = v => v ? signed(100 * v, Number.isInteger(100 * even) ? 0 : 1) : "0";
  const ticks = () => ticksOf(axis, [-even, 0, even], said);
  const picture = (m, row, yes) => strip(
    rect(across(axis(-floor)), 2, across(floor / far), 16, { class: "floor" }), rulesOf(axis, [-even, 0, even]),
    number(row.detectable) !== null && row.detectable < far && [-row.detectable, row.detectable].map(v =>
      line(across(axis(v)), 5, across(axis(v)), 15, { class: "seen" })),
    estimate(m || models[0], row.difference, null, axis, !yes));
  const cell = (label, inside) => html("td.n.third", { "data-label": label }, inside);
  const tested = row => number(row.p_holm) !== null, all = shown.map(row => byId.get(row.model));
  const one = row => {
    const m = byId.get(row.model), yes = tested(row) && row.p_holm < 0.05, short = m && tested(row) && briefly(m, all);
    const about = [(what === "any" || !tested(row)) && row.what, row.base !== row.model && short === m?.label
      && `against ${byId.get(row.base)?.label ?? row.base}`, short === m?.label && `${plain(row.items)} items`];
    const why = m && what === HELD_OUT && tested(row) && differing(m);
    return [html("tr", { "data-m": m?.index, class: why ? "said" : null },
      html("th", { scope: "row" }, m ? named(m, short || m.label) : row.model,
        html("span.sub", about.filter(Boolean).join(", "))),
      html("td.wide", { "data-label": "difference, points" }, picture(m, row, yes), pageWidth < 660 && ticks()),
      cell("points", points(row.difference)), cell("gained", plain(row.gained)), cell("lost", plain(row.lost)),
      cell("p", probability(row.p)),
      cell("corrected p", tested(row) ? html(yes ? "b" : "span", probability(row.p_holm)) : "–"),
      cell("could be seen", number(row.detectable) === null ? "–" : `±${(100 * row.detectable).toFixed(1)}`)),
    why && html("tr.says", html("td"), html("td", { colspan: 7 }, why))];
  };
  const head = () => heads("model", ["difference, points", ticks()], "points", "gained", "lost", "p", "corrected p",
    "could be seen");
  const tableOf = rows => html("table.tests.stack", head(), html("tbody", rows));
  const floors = noise.length > 0 && [html("tr.break",
    html("th", { colspan: 8, scope: "colgroup" }, "Where nothing should differ: the noise floor")), noise.map(one)];
  // On a phone every row is a block: what was repaired opens its group.
  const ofGroup = row => byId.get(row.model) ? repaired(byId.get(row.model)).label : row.model;
  const folded = [...new Set(shown.map(ofGroup))].map((name, k) => {
    const build = () => tableOf(shown.filter(row => ofGroup(row) === name).map(one));
    return k ? behind(`tests-${k}`, name, build) : build();
  });
  const drawn = pageWidth >= 660 ? tableOf([shown.map(one), floors]) : [folded,
    floors && behind("tests-noise", "Where nothing should differ: the noise floor", () => tableOf(noise.map(one)))];
  return [drawn,
    html("p.note", "Filled: the corrected p is below 0.05. An arrow: beyond the axis. Shaded: the largest difference "
      + "of the noise floor. Short strokes: what could be seen. A test counts the flips between two models. A gain is "
      + "confirmed where its interval of displaced lies above 0, too.")];
}
function pairTable() {
  if (!study.pairs?.length) return null;
  const find = (base, id) => byId.get(id) || models.find(m => m.tag === id && parent(m)?.tag === base);
  const name = (base, id) => {                             // by its id, or by its tag and that of what was repaired
    const m = find(base, id);
    return m ? named(m, m.tag || m.id) : id;
  };
  const on = pair => find(pair.base, pair.a) ? parent(find(pair.base, pair.a)).label : pair.base;
  const ends = numbers(study.pairs.flatMap(pair => [pair.difference, ...(pair.interval || [])]));
  const far = 1.06 * Math.max(0.1, ...ends.map(Math.abs)), axis = onAxis(-far, far), even = steps(0, far).at(-1);
  const bar = pair => html("div.bar-cell", strip(rulesOf(axis, [-even, 0, even]),
    number(pair.difference) !== null && estimate(find(pair.base, pair.a) || models[0], pair.difference,
      numbers(pair.interval || []).length === 2 ? pair.interval : null, axis)));
  const ticks = html("div.bar-cell", ticksOf(axis, [-even, 0, even], v => v ? signed(100 * v, 0) : "0"));
  return [html("h3", "Repair against repair"),
    html("p.note", "Difference of the displaced shares, repair minus the one it is compared with, and its 95 % "
      + "interval. Superior: the interval lies above 0. Non-inferior: above the margin of −5 points that was stated "
      + "before the run. Inferior: below 0, and not above the margin. Else undecided."),
    table("Repair against repair", ["on", "repair", "against", "verdict", "difference, points", ["drawn", ticks]],
      study.pairs.map(pair => [on(pair), name(pair.base, pair.a), name(pair.base, pair.b), pair.verdict,
        [points(pair.difference), span(pair.interval)], bar(pair)]), [1, 2, 3, 5])];
}
function claimTable() {
  if (!study.claims?.length) return null;
  return [html("h3", "What was claimed before the run"),
    table("Claims", ["claim", "verdict", "difference, points", "p", "corrected p"], study.claims.map(c =>
      [[html("b", c.name), html("span.sub.claim", c.statement)], html("b", c.verdict),
        [typeof c.estimate === "number" ? points(c.estimate) : plain(c.estimate), span(c.interval)],
        probability(c.p), probability(c.p_holm)]), [1])];
}

// --------------------------------------------------------------------------------------------------- 11. By attribute

const TASKS = { trained: "the answer to a question put as everybody's facts were told",
  unseen: "the same, put as the facts of other people only were told", "four-way": "the right value among four",
  hard: "among values of people who are alike", "last word": "the last word of a passage",
  continuation: "the true sentence among four" };

function drawAttributes() {
  const able = models.filter(m => m.attributes), asked = models.filter(m => m.tasks);
  const splits = [...new Set(asked.flatMap(m => Object.values(m.tasks).flatMap(Object.keys)))];
  const usual = splits.includes("heldout") ? "heldout" : splits[0];
  const split = splits.includes(chosen.tasks) ? chosen.tasks : usual;
  const score = (m, task) => Object.values(own(own(m.tasks, task), split) || {})[0];    // the task's first measurement
  fill(part("attributes", ".controls"), splits.length > 1 && picker("tasks-split", "people of the tasks",
    splits.map(s => [s, spoken(s)]), split, v => choose({ tasks: v }, ["attributes"])));
  const recalls = scoresOf(able, "attributes", (m, n) => own(m.attributes, n)), tasks = scoresOf(asked, "tasks", score);
  const all = numbers([...recalls.found, ...tasks.found].flat().map(v => v[0]));
  const low = Math.floor(10 * Math.min(1, ...all)) / 10, high = Math.max(1, ...all);
  const known = tasks.names.filter(n => own(TASKS, n));
  fill(part("attributes", "figure"), all.length > 0 && ramp(percent(low), percent(high)), html("div.small-multiples",
    html("div", able.length ? scores("recall", recalls, low, high) : missing("Recall by attribute")),
    asked.length > 0 && html("div", scores(`tasks, ${spoken(split)}`, tasks, low, high))),
  known.length > 0 && html("p.note", known.map(n => `${n}: ${TASKS[n]}`).join("; ") + "."));
}
// What `of` finds of each model and name: [mean, low, high].
function scoresOf(list, key, of) {
  const names = [...new Set(list.flatMap(m => Object.keys(m[key])))];
  return { list, names, found: list.map(m => names.map(n => of(m, n) || [null])) };
}
function scores(corner, { list, names, found }, low, high) {
  const hints = (i, j) => {
    const [mean, ...ends] = found[i][j];
    return numbers(ends).length === 2 ? `${list[i].label}, ${names[j]}\n${tenths(mean)} (${shareRange(ends)})` : null;
  };
  return heat({ corner, rows: list.map(m => named(m, briefly(m, list))), cols: names,
    values: found.map(row => row.map(v => v[0] ?? null)), low, high, inside: percent, hints,
    first: list.map(m => !isRepaired(m)) });
}

// ----------------------------------------------------------------------------------------------- 12. Dose and response

const DOSE = { bits: "bits a weight", sparsity: "share of zeros", damage: "damage", size: "parameters of the repair",
  steps: "steps of training" };
const RATIOS = ["size", "steps"];                           // drawn on a logarithm
const DASHES = [null, "6 3", "2 3", "9 3 2 3", "1 5", "12 4"];
const MARKS = ["dense", "quantize", "LoRA", "prune", "prompt", "prefix"];

function drawSweeps() {
  const sweeps = Object.entries(study.sweeps || {}).filter(([, sweep]) => sweep.points?.length);
  const names = sweeps.map(([name]) => name), usual = names.includes("damage") ? "damage" : names[0];
  const name = names.includes(chosen.sweep) ? chosen.sweep : usual;
  if (!name) {
    fill(part("sweeps", ".controls"));
    fill(part("sweeps", ".behind"));
    fill(part("sweeps", "figure"), missing("Sweeps", "python -m study sweep bits adds one."));
    return;
  }
  const points = study.sweeps[name].points, damage = name === "damage", repairs = points.some(p => p.displaced);
  const measures = repairs ? ["displaced", "relearned"]
    : [...RECALLS.map(([n]) => n), "perplexity"].filter(n => points.some(p => own(p, n) !== null));
  const measure = measures.includes(chosen.measure) ? chosen.measure : measures[0];
  fill(part("sweeps", ".controls"),
    picker("sweep-of", "varied", names.map(n => [n, DOSE[n] || n]), name, v => choose({ sweep: v }, ["sweeps"])),
    picker("sweep-measure", "measured", measures.map(n => [n, nameOf(n)]), measure,
      v => choose({ measure: v }, ["sweeps"])));
  const share = repairs || measure.startsWith("recall"), sayShare = v => `${plain(100 * v)} %`;
  const found = points.map(p => {
    const [mean, low = null, high = null] = [own(p, measure)].flat();
    const panel = (damage ? p.repair : p.base) || "", level = damage ? String(p.x) : p.repair;
    return { series: p.series, panel, level, x: damage ? p.lost : p.x, mean, low, high };
  }).filter(p => number(p.x) !== null && number(p.mean) !== null);
  const x = { name: damage ? "held-out recall that was lost" : DOSE[name] || name, log: RATIOS.includes(name),
    text: damage || name === "sparsity" ? sayShare : plain, values: found.map(p => p.x) };
  const held = v => share ? Math.max(-0.5, Math.min(1.5, v)) : v;                       // see scatter()
  const y = { name: nameOf(measure), text: share ? sayShare : plain,
    values: [...(repairs ? [0] : []), ...found.flatMap(p => numbers([p.mean, p.low, p.high]).map(held))] };
  const role = repairs ? "repaired" : "compressed";
  const panels = [...new Set(found.map(p => p.panel))];
  const width = panels.length > 1 && pageWidth > 900 ? (pageWidth - 36) / 2 : Math.min(pageWidth, 820);
  const what = measure === "displaced" ? "came back on people whom no repair read about"
    : "came back on seen people beyond what was displaced";
  const about = "A panel for each repair. A mark is one compressed model: to the right what it lost, upwards the "
    + `share of it that ${what}.`;
  fill(part("sweeps", "figure"), damage && html("p.note", about),
    html("div.small-multiples", panels.map(panel => html("div", panel && html("h3", panel),
      lines(found.filter(p => p.panel === panel), { width, role, x, y })))));
  fill(part("sweeps", ".behind"), behind("sweep-table", "The lines as a table", () => table("Sweep",
    ["series", ...(damage ? ["repair", "level"] : repairs ? ["model", "repair"] : []), x.name, y.name,
      "95 % interval"],
    found.map(p => [p.series, ...(repairs ? [p.panel, p.level] : []), x.text(p.x),
      share ? tenths(p.mean) : plain(p.mean),
      numbers([p.low, p.high]).length === 2 ? shareRange([p.low, p.high]) : "–"]))));
}
// Lines with bands and their names at the right end; series differ by dash, mark and name, not by colour.
function lines(found, { width, role, x: across, y: up }) {
  const series = [...new Set(found.map(p => p.series))].map((name, k) => ({ name, dash: DASHES[k % DASHES.length],
    mark: MARKS[k % MARKS.length], points: found.filter(p => p.series === name).sort((a, b) => a.x - b.x) }));
  const height = Math.max(280, Math.min(400, width * 0.55));
  const y = scaleOf(up.values, [height - 50, 30]), left = Math.max(...y.ticks.map(t => textWidth(up.text(t)))) + 14;
  const room = Math.max(...series.map(s => textWidth(s.name))) + 50, narrow = room > width * 0.36;
  const box = { left, right: width - (narrow ? 10 : room), top: 30, bottom: height - 50 };
  const x = scaleOf(across.values, [box.left, box.right], across.log);
  const held = v => Math.max(box.top - 4, Math.min(box.bottom + 4, y(v))), hue = `var(--${role})`;
  const stroke = s => ({ stroke: hue, "stroke-width": 1.8, "stroke-dasharray": s.dash, fill: "none" });
  const mark = s => path(shape(s.mark, 4), { fill: hue, stroke: hue });
  const band = s => {
    const some = s.points.filter(p => numbers([p.low, p.high]).length === 2);
    const edge = [...some.map(p => [x(p.x), held(p.high)]), ...[...some].reverse().map(p => [x(p.x), held(p.low)])];
    return some.length > 0 && path(`M${edge.join("L")}Z`,
      { fill: hue, stroke: hue, "stroke-width": some.length > 1 ? 0 : 8, opacity: 0.14 });
  };
  const level = (s, p) => p.panel && p.level !== s.name ? `${p.level}, ` : "";
  const said = (s, p) => [`${s.name}, ${level(s, p)}${across.name} ${across.text(p.x)}`,
    `${up.name} ${up.text(p.mean)}` + (p.low === null ? "" : ` (${up.text(p.low)} to ${up.text(p.high)})`)].join("\n");
  const places = apart(series.map(s => held(s.points.at(-1).mean)), 15);                 // in the order of their ends
  const name = (s, k) => [line(box.right + 6, places[k], box.right + 36, places[k], stroke(s)),
    svg("g", { transform: `translate(${box.right + 21} ${places[k]})` }, mark(s)),
    text(box.right + 42, places[k] + 4, s.name, { class: "halo" })];
  const drawn = series.map((s, k) => [path("M" + s.points.map(p => [x(p.x), held(p.mean)]).join("L"), stroke(s)),
    s.points.map(p => hint(svg("g", { transform: `translate(${x(p.x)} ${held(p.mean)})` }, mark(s)), said(s, p))),
    !narrow && name(s, k)]);
  const key = s => html("li.key", svg("svg", { width: 34, height: 14, "aria-hidden": "true" },
    line(0, 7, 34, 7, stroke(s)), svg("g", { transform: "translate(17 7)" }, mark(s))), s.name);
  return [svg("svg", { ...sized(width, height), role: "img",
    "aria-label": `${up.name} against ${across.name}: ${series.map(s => s.name).join(", ")}` },
  axes(box, x, y, across.name, up.name, across.text, up.text), series.map(band), drawn),
  narrow && html("ul.keys", series.map(key))];
}

// --------------------------------------------------------------------------------------------------------- 13. Answers

// Facts a page: a phone holds few, and many models make a row long.
const factsAPage = models => innerWidth < 700 ? 10 : Math.max(10, Math.min(50, Math.floor(800 / (models + 2))));
const alphabet = new Intl.Collator("en", { numeric: true });

function sorted(list) {
  const key = chosen.sort.replace(/^-/, ""), way = chosen.sort.startsWith("-") ? -1 : 1;
  const m = models[key.replace(/^m/, "")], byText = (a, b) => way * alphabet.compare(facts[a][key], facts[b][key]);
  if (key === "question" || key === "gold") return list.sort(byText);
  if (!m || !answered(m)) return list;
  const by = new Map(list.map(i => [i, m === root(m) ? number(logprob(m, i)) : gain(m, i)]));
  const lacks = i => by.get(i) === null;                                                 // unmeasured ones come last
  return list.sort((a, b) => lacks(a) - lacks(b) || way * (by.get(a) - by.get(b)));
}
function drawBehaviours() {
  const place = part("behaviours", "figure"), shown = selected().filter(answered);
  if (!facts.length) {
    fill(place, missing("Answers"));
    fill(part("behaviours", ".flips"), missing("Flips"));
    fill(part("behaviours", ".change"));
    return;
  }
  const [, a, b] = chosen.show.match(/^flip (\d+) (\d+)$/) || [];
  const options = filters(inQuestion(), shown, [models[a], models[b]]);
  const filter = options.find(f => f.key === chosen.show) || options[0];
  const pool = bitsWhere(facts.length, i => !chosen.split || facts[i].split === chosen.split);
  drawFilters(options, filter, pool);

  const wanted = chosen.q.toLowerCase(), holds = string => string.toLowerCase().includes(wanted);
  const found = i => !wanted || Object.values(facts[i]).some(holds) || shown.some(m => holds(answer(m, i)));
  const before = listOf(and(pool, filter.set)).filter(found);
  const list = sorted(drawChange(shown, before)), many = factsAPage(shown.length);
  const pages = Math.max(1, Math.ceil(list.length / many));
  const page = Math.min(pages, Math.max(1, parseInt(chosen.page) || 1));
  const from = (page - 1) * many, rows = list.slice(from, from + many);
  const none = "None of the selected models has recorded answers: select others above.";
  const said = `${plain(from + 1)} to ${plain(from + rows.length)} of ${count(list.length, "fact")}`;
  const back = button("facts-back", "← previous", () => turn({ page: String(page - 1) }), page === 1);
  const on = button("facts-on", "next →", () => turn({ page: String(page + 1) }), page === pages);
  fill(place, !shown.length && html("p.missing", none),
    html("div.controls.found",
      html("span", { id: "facts-found", role: "status" }, list.length ? said : "No such fact."),
      pages > 1 && html("div.group", back, on)),
    html("div.scroll", { tabindex: 0, role: "group", "aria-label": "Facts" }, factTable(rows, shown, list)));
  fill(part("behaviours", ".flips"), flips(shown, pool));
}
function drawFilters(options, filter, pool) {
  const splits = [...new Set(facts.map(f => f.split))], controls = part("behaviours", ".controls");
  const damaged = models.filter(m => isCompressed(m) || m.kind === "control");
  const list = [
    picker("facts-of", "compression in question", modelOptions(damaged), inQuestion().id,
      v => choose({ of: v, page: "1" })),
    picker("facts-show", "show", options.map(f => [f.key, `${f.words} (${plain(size(pool, f.set))})`]),
      filter.key, v => turn({ show: v })),
    picker("facts-split", "people", [["", "all"], ...splits.map(s => [s, spoken(s)])], chosen.split,
      v => turn({ split: v }))];
  let search = document.getElementById("search");
  if (!search) {                                            // put in place once: moving the box would lose its caret
    let waiting = null;
    const look = () => choose({ q: search.value, page: "1" }, ["behaviours"], true);    // no step of Back for a letter
    search = html("input", { id: "search", type: "search", placeholder: "person, attribute, answer",
      oninput: () => { clearTimeout(waiting); waiting = setTimeout(look, 150); } });
    fill(controls, list, html("label", "search", search));
  }
  if (search.value !== chosen.q && document.activeElement !== search) search.value = chosen.q;
}
// How the log-probability of the right answer moved, as a histogram; dragging over it keeps the facts of that range.
function drawChange(shown, list) {
  const able = shown.filter(m => m !== root(m)), place = part("behaviours", ".change");
  const m = able.find(o => o.id === chosen.change) || able[0];
  const moved = m ? new Map(list.map(i => [i, gain(m, i)]).filter(([, v]) => v !== null)) : new Map();
  if (!moved.size) {
    fill(place);
    return list;
  }
  const limit = (v, otherwise) => v === "" || !Number.isFinite(Number(v)) ? otherwise : Number(v);
  const low = limit(chosen.from, -Infinity), high = limit(chosen.to, Infinity);
  const box = (key, label) => html("label.short", label, html("input", { id: `change-${key}`, type: "number", step: 0.1,
    value: chosen[key], onchange: event => turn({ [key]: event.target.value }) }));
  fill(place, html("div.controls",
    picker("change-of", "change Δ in", modelOptions(able), m.id, v => turn({ change: v })),
    box("from", "from"), box("to", "to"),
    button("change-all", "all changes", () => turn({ from: "", to: "" }), chosen.from === "" && chosen.to === "")),
  html("p.note", "Facts by the change of the right answer's log-probability, in nats. Heights are square roots of "
    + "counts; the last bars hold all beyond. Drag over it to keep a range."),
  changes([...moved.values()], low, high, `Change of the right answer's log-probability in ${m.label}`));
  const inside = i => moved.has(i) && moved.get(i) >= low && moved.get(i) <= high;
  return low === -Infinity && high === Infinity ? list : list.filter(inside);
}
function changes(values, low, high, label) {
  const FAR = 5, BINS = 40, middle = k => (k / BINS * 2 - 1) * FAR;                     // the last bins hold all beyond
  const bins = Array.from({ length: BINS + 1 }, () => 0);
  for (const v of values) bins[Math.max(0, Math.min(BINS, Math.round((v / FAR + 1) / 2 * BINS)))]++;
  const width = Math.min(pageWidth, 620), base = 80, most = Math.max(...bins), step = (width - 20) / BINS;
  const x = v => 10 + (v / FAR + 1) / 2 * (width - 20), value = at => ((at - 10) / (width - 20) * 2 - 1) * FAR;
  const tall = n => n ? Math.max(2, Math.sqrt(n / most) * 68) : 0;
  const kept = k => middle(k) >= low - FAR / BINS && middle(k) <= high + FAR / BINS;
  const said = (n, k) => `${count(n, "fact")}: Δ ${{ 0: "below ", [BINS]: "above " }[k] || ""}${signed(middle(k))}`;
  const canvas = svg("svg", { ...sized(width, 110), role: "img", style: "touch-action: pan-y",
    "aria-label": `${label}, ${count(values.length, "fact")}` },
  bins.map((n, k) => hint(rect(x(middle(k)) - step * 0.45, base - tall(n), step * 0.9, tall(n),
    { class: kept(k) ? "bin" : "bin out" }), said(n, k))),
  line(x(0), 4, x(0), base, { class: "zero" }), line(0, base, width, base, { class: "zero" }),
  [-4, -2, 0, 2, 4].map(v => text(x(v), 96, v ? signed(v, 0) : "0", { class: "muted", "text-anchor": "middle" })),
  text(0, 110, "← less likely", { class: "muted" }),
  text(width, 110, "likelier →", { class: "muted", "text-anchor": "end" }));
  brush(canvas, { left: 0, right: width, top: 4, bottom: base }, ({ left, right }) =>
    turn({ from: value(left).toFixed(2), to: value(right).toFixed(2) }));
  return canvas;
}
function factTable(rows, shown, list) {
  const head = (key, label, below, m = null) => {
    const up = chosen.sort === key, down = chosen.sort === `-${key}`, next = up ? `-${key}` : down ? "" : key;
    return html("th", { scope: "col", "data-m": m?.index, "data-name": label,
      "aria-sort": up ? "ascending" : down ? "descending" : null },
      button(`sort-${key}`, [label, up ? " ↑" : down ? " ↓" : ""], () => turn({ sort: next })), below);
  };
  const alike = m => briefly(m, shown), share = m => {
    const known = shareRight(m, list);
    return html("span.sub", known === null ? "nobody can know" : `${percent(known)} right`);
  };
  return html("table.answers.stack",
    html("thead", html("tr", head("question", "question"), head("gold", "right answer"),
      shown.map(m => head(`m${m.index}`, alike(m), share(m), m)))),
    html("tbody", rows.map(i => html("tr",
      html("td", facts[i].question, html("span.sub", `${spoken(facts[i].split)} · ${facts[i].attribute}`)),
      html("td.inline", { "data-label": "right answer" }, facts[i].gold),
      shown.map(m => answerCell(m, i, alike(m)))))));
}
function answerCell(m, i, name) {
  const change = m === root(m) ? null : gain(m, i), log = logprob(m, i);
  const tenth = v => typeof v === "number" ? fixed(v, 1) : plain(v);                    // as finely as they are kept
  const moved = change !== null ? `Δ ${signed(change, 1)}` : log !== null && `log p ${tenth(log)}`;
  return html("td.half", { "data-label": name },
    html(correct(m, i) ? "span.right" : "span.wrong", answer(m, i) || "(nothing)"), moved && html("span.sub", moved));
}
function flips(shown, pool) {
  if (shown.length < 2) return html("p.missing", "Select two models or more to compare them.");
  const values = shown.map(a => shown.map(b => a === b ? null : size(rightOf(a), pool, rightOf(b))));
  const inside = (n, i, j) => html("button", { id: `flip-${shown[i].index}-${shown[j].index}`, type: "button",
    "aria-label": `${n} facts: ${shown[i].label} right, ${shown[j].label} wrong` }, plain(n));
  const most = Math.max(1, ...values.flat());
  const names = shown.map(m => briefly(m, shown));
  return [ramp("0", count(most, "fact")), heat({ corner: "right ↓ wrong →",
    rows: shown.map((m, k) => named(m, names[k])), cols: names, values, low: 0, high: most, inside })];
}

// --------------------------------------------------------------------------------------------------------- 14. Layers

function histogram({ edges, counts }) {
  const high = counts.map(c => Math.sqrt(number(c) || 0)), most = Math.max(...high, 1), wide = 110 / counts.length;
  const all = numbers(counts).reduce((s, c) => s + c, 0), top = high.indexOf(Math.max(...high));
  const said = `single weights changed by ${plain(edges[0])} to ${plain(edges.at(-1))}; `
    + `${percent(all ? counts[top] / all : null)} of them by ${plain(edges[top])} to ${plain(edges[top + 1])}`;
  return hint(svg("svg", { width: 110, height: 22, role: "img", "aria-label": said },
    line(0, 21.5, 110, 21.5, { class: "rule" }),
    high.map((c, k) => rect(k * wide, 21 - 20 * c / most, Math.max(0.5, wide - 0.6), 20 * c / most,
      { fill: "var(--compressed)" }))), said);
}
function meter(v, most, string) {
  const bar = number(v) !== null && most > 0 && svg("svg", { width: 90, height: 6, "aria-hidden": "true" },
    rect(0, 0, 90, 6, { fill: "var(--panel)" }),
    rect(0, 0, 90 * Math.min(1, Math.max(0, v / most)), 6, { fill: "var(--compressed)" }));
  return html("span.meter", bar, html("span", string));
}
function drawLayers() {
  const able = models.filter(m => m.layers && m.layers.length);
  const wanted = [m => m.id === chosen.layers, m => m === inQuestion(), isSelected, () => true];
  const m = wanted.map(test => able.find(test)).find(Boolean);
  fill(part("layers", ".controls"),
    m && picker("layers-of", "model", modelOptions(able), m.id, v => choose({ layers: v }, ["layers"])));
  fill(part("layers", "figure"), m ? layerTable(m) : missing("Layers"));
  const title = "Relative output error of every compressed model, layer by layer";
  fill(part("layers", ".error"), able.length > 1 && behind("error-table", title, () => errors(able)));
  fill(part("layers", ".similarity"), similarity());
}
function layerTable(m) {
  const most = Math.max(0, ...numbers(m.layers.map(l => l.relative_output_error)));
  const kinds = [                                           // key, head, cell; a key that no layer has is left out
    ["relative_output_error", "relative output error",
      l => meter(l.relative_output_error, most, steady(l.relative_output_error))],
    ["weight_change", "relative weight change", l => steady(l.weight_change)],
    ["histogram", "weight changes", l => l.histogram ? histogram(l.histogram) : "not measured"],
    ["zeros", "zeros", l => meter(l.zeros, 1, percent(l.zeros))],
    ["bits", "bits", l => plain(l.bits)],
    ["shape", "out × in", l => (l.shape || []).join(" × ")],
    ["error_before", "error, simplest method", l => steady(l.error_before)],
    ["error_after", "error, this method", l => steady(l.error_after)],
    ["damp", "damping", l => steady(l.damp)],
  ].filter(([key]) => m.layers.some(l => own(l, key) !== null));
  return [table(`Layers of ${m.label}`, ["layer", ...kinds.map(k => k[1])],
    m.layers.map(l => [html("code", l.name), ...kinds.map(k => k[2](l))])),
    html("p.note", "Error: of the layer's output on the calibration text, squared; relative: its root, as a share of "
      + "the output's size. The simplest method rounds to nearest, or drops the smallest weights."),
    m.layers.some(l => l.histogram) && html("p.note", "Weight changes: after minus before, weight by weight, in units "
      + "of the layer's root mean square weight. Heights are square roots of counts: a peak of untouched weights would "
      + "else hide the others.")];
}
// One column a compressed model: where does each of them hurt?
function errors(able) {
  const names = [...new Set(able.flatMap(m => m.layers.map(l => l.name)))];
  const values = names.map(n => able.map(m => own(m.layers.find(l => l.name === n), "relative_output_error")));
  const most = Math.max(0, ...numbers(values.flat()));
  return [ramp("0", plain(most)), heat({ corner: "layer", rows: names.map(n => html("code", n)),
    cols: able.map(m => m.label), values, low: 0, high: most, inside: steady })];
}
function similarity() {
  const c = inQuestion(), known = m => m.similarity && (m.similarity.attention || m.similarity.output);
  const some = family(c).filter(m => m !== root(m) && known(m));        // the dense model is like itself
  if (!some.length) return missing(`Similarity of ${c.label}`);
  const grids = some.map(m => {
    const attention = m.similarity.attention || [], output = m.similarity.output || [];
    const deep = Math.max(attention.length, output.length), heads = Math.max(0, ...attention.map(row => row.length));
    const range = n => Array.from({ length: n }, (_, k) => k);
    const values = range(deep).map(l => [...range(heads).map(h => attention[l]?.[h] ?? null),
      ...(output.length ? [output[l] ?? null] : [])]);
    return { m, values, rows: range(deep).map(String),
      cols: [...range(heads).map(String), ...(output.length ? ["out"] : [])] };
  });
  const all = numbers(grids.flatMap(g => g.values.flat())), low = Math.min(...all), high = Math.max(...all);
  return [
    html("p.note", "A row is a layer, a column a head, the last column the layer's output; 1 is the same as dense."),
    ramp(plain(low), plain(high)),
    html("div.small-multiples", grids.map(({ m, ...grid }) => html("div",
      html("h4", { "data-m": m.index }, icon(m), briefly(m, some)),
      heat({ ...grid, corner: "layer", low, high, inside: two }))))];
}

// ------------------------------------------------------------------------------------------------------------ 15. IDP

function drawIdp() {
  const able = models.filter(m => m.idp), place = part("idp", "figure");
  const m = able.find(o => o.id === chosen.idp) || able.find(o => repaired(o) === inQuestion()) || able[0];
  fill(part("idp", ".controls"),
    m && picker("idp-of", "model", modelOptions(able), m.id, v => choose({ idp: v }, ["idp"])));
  if (!m) {
    fill(place, missing("Dynamic prompting"));
    return;
  }
  const { chosen: taken, by_attribute: byAttribute, correlation, points, selectors } = m.idp;
  const ends = correlation?.interval ? `, 95 % interval ${correlation.interval.map(two).join(" to ")}` : "";
  fill(place,
    html("h3", "Which prompt, for which questions"),
    taken?.length ? prompts(taken, byAttribute || {}) : missing("The choice of prompts"),
    selectors?.length > 0 && [html("h3", "One pool, every way to choose"), choices(m, selectors)],
    html("h3", "Was more attention worth more?"),
    correlation && html("p", `Rank correlation of attention score and gain: ${two(correlation.rho)}${ends}.`),
    points?.length ? cloud(m, points) : missing("Attention against gain"));
}
function prompts(taken, byAttribute) {
  const sum = row => numbers(row).reduce((s, v) => s + v, 0);
  const share = row => row.map(v => number(v) === null || !sum(row) ? null : v / sum(row));
  const rows = [["all questions", taken], ...Object.entries(byAttribute)];
  const most = Math.max(0, ...numbers(taken)), top = taken.indexOf(most);
  return [
    sum(taken) > 0 && html("p", most === sum(taken) ? `All ${plain(most)} questions took prompt ${top}.`
      : `Prompt ${top} was taken most: by ${percent(most / sum(taken))} of ${plain(sum(taken))} questions.`),
    ramp("0 %", "100 %"),
    heat({ corner: "prompt", rows: rows.map(([name, row]) => `${name} (${plain(sum(row))})`),
      cols: taken.map((_, k) => String(k)), values: rows.map(([, row]) => share(row)),
      low: 0, high: 1, inside: percent }),
    html("p.note", `Share of the questions that took each prompt; by chance each has ${percent(1 / taken.length)}.`)];
}
// The rule beside its floors and ceilings: what other ways to choose reach with the same prompts and questions.
function choices(m, selectors) {
  const say = (ends, f) => numbers(ends || []).length === 2 ? ends.map(f).join(" to ") : "not measured";
  const all = numbers(selectors.flatMap(s => [s.recall, ...(s.interval || [])]));        // dots may leave out 0
  const low = Math.floor(10 * Math.min(1, ...all)) / 10, high = Math.ceil(10 * Math.max(low + 0.1, ...all)) / 10;
  const axis = onAxis(low, high), marks = [low, (low + high) / 2, high];
  const bar = ({ recall, interval: ends }) => strip(rulesOf(axis, marks),
    number(recall) !== null && estimate(m, recall, numbers(ends || []).length === 2 ? ends : null, axis));
  const ticks = html("div.bar-cell", ticksOf(axis, marks, v => v === high ? percent(v) : plain(100 * v)));
  const head = ["choice", "held-out recall", ["drawn", ticks], "points over the paper's rule", "extra passes"];
  const over = s => s.over_rule?.every(v => v === 0) ? "the same answers" : say(s.over_rule, points);
  const row = (s, k) => [s.name, [tenths(s.recall), span(s.interval)], html("div.bar-cell", bar(s)), k ? over(s) : "–",
    plain(s.extra_passes)];
  return [table("Ways to choose", head, selectors.map(row)),
  html("p.note", "Oracle: for each question a prompt that answers it, if there is one, picked with the answer known. "
    + "Its floor: the same freedom among prompts that were never trained. Points over the paper's rule: the 95 % "
    + "interval of the difference. Extra passes: how often the model runs besides, for one question.")];
}
function cloud(m, all) {
  const points = all.filter(p => numbers(p).length === 2);
  const width = Math.min(720, pageWidth), height = 340;
  if (!points.length) return missing("Attention against gain");
  const box = { left: 52, right: width - 10, top: 30, bottom: height - 50 };
  const x = scaleOf(points.map(p => p[0]), [box.left, box.right]);
  const y = scaleOf(points.map(p => p[1]), [box.bottom, box.top]);
  const said = `${count(points.length, "point")}: gain in log-probability against attention score`;
  return [
    svg("svg", { ...sized(width, height), role: "img", "aria-label": said },
      axes(box, x, y, "attention the prompt receives", "gain in log-probability of the right answer", plain, plain),
      points.map(p => svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 3, fill: colour(m), "fill-opacity": 0.45 }))),
    behind("idp-table", `${count(points.length, "point")} as a table`,
      () => table("Points", ["attention", "gain"], points.map(p => p.map(v => plain(v)))))];
}

// ------------------------------------------------------------------------------------------------ 16. How it was made

function drawMade() {
  const pairs = object => Object.keys(object || {}).length > 0 && html("dl",
    Object.entries(object).map(([k, v]) => [html("dt", spoken(k)), html("dd", words(v) || "none")]));
  const block = (title, inside) => html("div", html("h3", title), inside || missing(title));
  const times = study.times || [], most = Math.max(0, ...numbers(times.map(t => t.seconds)));
  const timed = () => table("Times", ["step", "took", "made or reused"],
    times.map(t => [t.step, meter(t.seconds, most, seconds(t.seconds)), t.reused ? "reused" : "made"]));
  const example = o => models.find(m => m.operation?.name === o.name) || o.name;
  const better = { true: "higher is better", false: "lower is better" };
  fill(part("made", "figure"), html("div.columns",
    block("Run", pairs({ command: study.command ?? "not recorded",
      created: study.created?.replace("T", " ") ?? "not recorded",
      took: seconds(study.seconds), seed: study.settings?.seed ?? "not recorded", models: plain(models.length),
      facts: plain(facts.length) })),
    block("Times", times.length > 12 ? behind("times-table", count(times.length, "step"), timed)
      : times.length > 0 && timed()),
    block("Versions", pairs(study.versions)),
    block("Settings", pairs(study.settings)),
    block("Operations", html("dl", [...operations.values()].filter(o => models.some(m => m.operation?.name === o.name))
      .map(o =>
      [html("dt", html("span.key", icon(example(o)), o.name)), html("dd", o.description || "")]))),
    block("Measurements", html("dl", study.metrics.map(n => [html("dt", nameOf(n.name)), html("dd", n.description || "",
      html("span.sub", [n.unit, better[n.higher_is_better]].filter(Boolean).join(", ")))])))));
}

// ---------------------------------------------------------------------------------------------------------- 17. Start

const VIEWS = { verdict: drawVerdict, tradeoffs: drawTradeoffs, map: drawMap, tests: drawTests,
  attributes: drawAttributes, sweeps: drawSweeps, behaviours: drawBehaviours, layers: drawLayers, idp: drawIdp,
  made: drawMade };
const CHOSEN_VIEWS = ["tradeoffs", "map", "behaviours", "layers", "idp"];        // those that show what is selected

function drawChosen() {
  const list = selected(), place = document.getElementById("chosen");
  const chip = m => html("button.chip", { id: `chip-${m.index}`, type: "button", "data-m": m.index,
    "aria-label": `${m.label}: take out of the selection`, onclick: () => select(list.filter(s => s !== m)) },
    icon(m), m.label, html("span", { "aria-hidden": "true" }, "×"));
  const box = html("details", { id: "chips" },
    html("summary", list.length ? html("b", `${list.length} selected`) : "Nothing is selected: click a model below.",
      list.length > 0 && html("span.names", list.map(m => m.label).join(", "))),
    html("div.chips", list.length > 1 && button("select-none", "clear", () => select([])), list.map(chip)));
  box.open = opened.has("chips");
  box.addEventListener("toggle", () => opened[box.open ? "add" : "delete"]("chips"));
  fill(place, box);
}
function draw(views = Object.keys(VIEWS)) {
  const here = document.activeElement?.id;
  closeHint();
  drawChosen();
  for (const view of views) {
    try {
      VIEWS[view]();
    } catch (error) {                                       // a malformed part of a file spoils its own view only
      fill(part(view, "figure"), html("p.missing", `This view cannot be drawn from this file: ${error.message}`));
      console.warn(error);
    }
  }
  if (here && document.activeElement?.id !== here) document.getElementById(here)?.focus({ preventScroll: true });
}
function goTo(view) {
  const place = document.getElementById(view);
  document.getElementById(`${view}-h`)?.focus({ preventScroll: true });
  // The views above it are laid out a few frames later, when they come near: it is where it was asked to be only then.
  let frames = 10, top = null;
  const settle = () => {
    if (place.getBoundingClientRect().top !== top) place.scrollIntoView();
    top = place.getBoundingClientRect().top;
    if (frames-- > 0) requestAnimationFrame(settle);
  };
  if (place) settle();
}
function drawHeader() {
  const { hypothesis, name } = study, claims = study.claims || [], judged = models.filter(m => m.verdict && parent(m));
  const outcome = base => html("li", { "data-m": base.index }, html("b", base.label),
    judged.filter(m => parent(m) === base).map(m => html("span", `${m.tag || m.id}: ${m.verdict}`)));
  const claim = c => html("li", html("b", `${c.name}: ${c.verdict}`), html("span", c.statement));
  const about = [name, count(models.length, "model"), facts.length > 0 && count(facts.length, "fact")];
  fill(document.getElementById("kicker"), about.filter(Boolean).join(" · "));
  fill(document.getElementById("folded"),
    (hypothesis || claims.length > 0) && html("details", html("summary", "What was stated before the run"),
      hypothesis && html("p.quote", hypothesis), claims.length > 0 && html("ul.outcome", claims.map(claim))),
    judged.length > 0 && html("details", html("summary", `What was found, ${count(judged.length, "sentence")}`),
      html("ul.outcome", [...new Set(judged.map(parent))].map(outcome))));
}
function drawNavigation() {
  const views = [...document.querySelectorAll("main > section")];
  const follow = (event, view) => {
    event.preventDefault();
    chosen.view = view.id;
    writeHash();
    goTo(view.id);
  };
  const links = new Map(views.map(view => [view,
    html("a", { href: `#view=${view.id}`, onclick: event => follow(event, view) },
    view.querySelector("h2").textContent)]));
  fill(document.querySelector("nav"), [...links.values()]);
  const watcher = new IntersectionObserver(seen => {
    const now = seen.find(s => s.isIntersecting);
    if (!now) return;
    for (const [view, link] of links) link.setAttribute("aria-current", String(view === now.target));
    const here = links.get(now.target), nav = here.parentNode;                      // on a phone the bar is long
    nav.scrollLeft = here.offsetLeft - nav.offsetLeft - 60;
  }, { rootMargin: "-25% 0px -70% 0px" });                  // a view is current while it crosses a line near the top
  views.forEach(view => watcher.observe(view));
}
function inflate(id) {
  const letters = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(letters), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
}
async function start() {
  load(await inflate("study").json(), await inflate("answers").json());
  DEFAULTS = defaults();
  drawHeader();
  drawNavigation();
  listenToPointer();
  for (const row of document.querySelectorAll("#picture [data-model]"))
    if (byId.has(row.dataset.model)) row.setAttribute("data-m", byId.get(row.dataset.model).index);
  part("behaviours", ".flips").addEventListener("click", pressFlip);
  const measure = () => { pageWidth = part("map", "figure").clientWidth; };
  measure();
  const showAddress = () => {
    const before = chosen.view;
    readHash();
    draw();
    if (chosen.view && chosen.view !== before) goTo(chosen.view);
    else if (!chosen.view && before) scrollTo(0, 0);
  };
  addEventListener("popstate", showAddress);
  let width = innerWidth, waiting = null;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(() => { measure(); draw(); }, 100);
  });
  showAddress();
  document.getElementById("waiting").remove();
  document.querySelector("main").removeAttribute("aria-busy");
}
if (typeof document !== "undefined") await start();
