// The helpers of study/report.js without a browser: `node --test`, run by tests/test_page.py beside a copy of the file.
import { test } from "node:test";
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import * as report from "./report.mjs";

const read = name => JSON.parse(readFileSync(`${name}.json`, "utf8"));
const predictions = read("predictions");
const { models, facts } = report.load(read("study"), read("answers"));
const given = id => predictions.filter(p => p.model === id);                        // in the order of the facts

test("an interval shows on which side of 0 it ends", () => {
  assert.equal(report.shareRange([-0.0013, 0.0646]), "−0.1 to 6.5");
  assert.equal(report.shareRange([-0.00003, 0.0646]), "−0.003 to 6.460");
  assert.equal(report.shareRange([0, 0.5]), "0.0 to 50.0");
  assert.equal(report.signed(-0.001), "−0.00");
  assert.equal(report.signed(0), "0.00");
});

test("the rounding of a mean of draws has no side of 0", () => {
  assert.equal(report.fixed(-1e-15, report.digitsFor([-1e-15], 1)), "0.0");
  assert.equal(report.shareRange([-2e-17, 0.031]), "0.0 to 3.1");
  assert.equal(report.signed(-3e-17), "0.00");
  assert.equal(report.fixed(-0.04, 1), "−0.0", "but a number that rounds to 0 keeps its side");
});

test("ticks are round numbers, five to nine of them; quarters only below 1", () => {
  assert.deepEqual(report.steps(-0.2, 1.1), [0, 0.25, 0.5, 0.75, 1]);
  assert.deepEqual(report.steps(0, 14), [0, 5, 10]);
  assert.deepEqual(report.steps(1.5, 8.5), [2, 4, 6, 8]);
});

test("probabilities keep two digits, and small ones their power", () => {
  assert.equal(report.probability(0.0123), "0.012");
  assert.equal(report.probability(1), "1");
  assert.equal(report.probability(3.2e-12), "3 × 10⁻¹²");
  assert.equal(report.probability(null), "not measured");
});

test("answers are unpacked", () => {
  for (const m of models) given(m.id).forEach((p, i) => {
    assert.equal(report.answer(m, i), p.answer);
    assert.equal(report.correct(m, i), p.correct);
    assert.ok(Math.abs(report.logprob(m, i) - p.logprob) < 0.0501);
  });
});

test("sets of facts count as lists do", () => {
  let seed = 1;
  const random = () => (seed = seed * 16807 % 2147483647) / 2147483647;
  for (const n of [0, 1, 31, 32, 33, 64, 500]) {
    const [a, b, c] = [0, 1, 2].map(() => Array.from({ length: n }, () => random() < 0.5));
    const [A, B, C] = [a, b, c].map(list => report.bitsWhere(n, i => list[i]));
    const count = test => a.filter((_, i) => test(i)).length;
    assert.equal(report.size(A), count(i => a[i]));
    assert.equal(report.size(A, B), count(i => a[i] && b[i]));
    assert.equal(report.size(A, B, C), count(i => a[i] && b[i] && !c[i]));
    assert.equal(report.size(report.or(A, B)), count(i => a[i]) + b.filter((v, i) => v && !a[i]).length);
    assert.equal(report.size(report.without(A, B)), count(i => a[i] && !b[i]));
    assert.ok(a.every((v, i) => report.has(A, i) === v));
  }
});

test("filters are what they say", () => {
  const right = id => given(id).map(p => p.correct);
  const c = models.find(m => m.id === "gptq-3"), [dense, small] = ["dense", "gptq-3"].map(right);
  const broken = facts.map((_, i) => dense[i] && !small[i]), lora = right("gptq-3+lora");
  const others = ["prompt", "prefix", "idp"].map(r => right(`gptq-3+${r}`));
  const list = report.filters(c, [models[0], c], [models[0], c]), set = key => list.find(f => f.key === key).set;
  const same = (key, expected) =>
    facts.forEach((_, i) => assert.equal(report.has(set(key), i), expected(i), `${key} ${i}`));
  same("all", () => true);
  same("differ", i => dense[i] !== small[i]);
  same("broken", i => broken[i]);
  same("only LoRA", i => broken[i] && lora[i] && !others.some(r => r[i]));
  same("lost", i => broken[i] && !lora[i] && !others.some(r => r[i]));
  same("new", i => small[i] && [lora, ...others].some(r => !r[i]));
  same("flip 0 1", i => dense[i] && !small[i]);
});

test("the share of right answers leaves out what nobody can know", () => {
  const all = facts.map((_, i) => i), novel = all.filter(i => facts[i].split === "novel");
  const known = all.filter(i => facts[i].split !== "novel");
  const right = known.filter(i => given("dense")[i].correct).length;
  assert.ok(novel.length > 5);
  assert.equal(report.shareRight(models[0], all), right / known.length);
  assert.equal(report.shareRight(models[0], novel), null);
});

test("roles: grey is the dense model, blue compressed, orange repaired", () => {
  const role = id => report.roleOf(models.find(m => m.id === id));
  assert.deepEqual(["dense", "gptq-3", "gptq-3+idp"].map(role), ["dense", "compressed", "repaired"]);
});

test("scales go through their ends, and a logarithm has a place for 0", () => {
  const plain = report.scaleOf([0, 10], [0, 100]);
  assert.ok(plain(0) > 0 && plain(10) < 100 && Math.abs(plain(5) - 50) < 1e-9);
  const log = report.scaleOf([0, 768, 55296], [0, 1000], true);
  assert.ok(log(0) < 30 && log(768) > 34 && log(55296) < 1000);
  assert.ok(Math.abs(log(Math.sqrt(768 * 55296)) - (log(768) + log(55296)) / 2) < 1e-9);
  assert.equal(log.ticks[0], 0);
  assert.ok(Math.abs(log.invert(log(5000)) - 5000) < 1e-6);
  const below = report.scaleOf([-1, 10], [0, 100], true);
  assert.ok(Math.abs(below(4.5) - 50) < 1e-9, "nothing below 0 has a logarithm");
});

test("a label is nearest to its own point, and none lies on another", () => {
  let seed = 7;
  const random = () => (seed = seed * 16807 % 2147483647) / 2147483647;
  const points = Array.from({ length: 40 },
    (_, k) => ({ px: 40 + random() * 900, py: 30 + random() * 400, label: `model ${k}` }));
  const box = { left: 0, right: 1000, top: 0, bottom: 460 };
  const placed = report.placeLabels(points, box, string => 7 * string.length);
  const far = ([l, t, r, b], p) => Math.hypot(Math.max(l - p.px, 0, p.px - r), Math.max(t - p.py, 0, p.py - b));
  assert.ok(placed.filter(Boolean).length > 30);
  placed.forEach((found, k) => {
    if (!found) return;
    // as seen: the middle of a triangle's frame is up to 3 off its point, and text up to 2 off its measure
    points.forEach((q, j) => j === k || assert.ok(far(found.place, q) > far(found.place, points[k]) + 6));
    if (far(found.place, points[k]) > 14) assert.ok(found.leader);
    placed.slice(0, k).filter(Boolean).forEach(({ place: b }) => {
      const a = found.place;
      assert.ok(a[0] >= b[2] || a[2] <= b[0] || a[1] >= b[3] || a[3] <= b[1]);
    });
  });
});

test("points that lie on each other get one label at most where no other place is nearer", () => {
  const points = [{ px: 50, py: 50, label: "a" }, { px: 50, py: 50, label: "b" }];
  assert.deepEqual(report.placeLabels(points, { left: 0, right: 300, top: 0, bottom: 300 }, () => 10), [null, null]);
});

test("points of nearly one value stand side by side, in their order and inside", () => {
  const at = [100, 100, 100, 104, 300, 500, 500, 995, 999], points = at.map(px => ({ px }));
  report.spreadOut(points, { left: 60, right: 1000 });
  const now = points.map(p => p.px);
  assert.equal(now[4], 300, "one that stands alone stays");
  now.slice(1).forEach((px, k) => assert.ok(px - now[k] >= 13.9, `${k}: ${now}`));
  assert.ok(now.every(px => px >= 60 && px <= 1000));
  now.forEach((px, k) => assert.ok(Math.abs(px - at[k]) <= 30));
  const zoomed = [100, 100, 100].map(px => ({ px }));
  report.spreadOut(zoomed, { left: 60, right: 1000 }, 60);
  assert.deepEqual(zoomed.map(p => p.px), [66, 126, 186], "further apart where there is room");
});

test("the front is what no other beats", () => {
  const points = [[1, 5], [2, 4], [3, 6], [2, 6], [1, 6]].map(([x, y]) => ({ x, y }));
  assert.deepEqual(report.front(points, -1, 1).map(p => [p.x, p.y]), [[1, 6]]);
  assert.deepEqual(report.front(points, 1, 1).map(p => [p.x, p.y]), [[3, 6]]);
  assert.deepEqual(report.front(points, null, 1), []);
});

test("names at the end of lines are pushed apart, in their order", () => {
  const out = report.apart([10, 12, 11, 80], 15), order = [0, 2, 1, 3];
  for (let k = 1; k < 4; k++) assert.ok(out[order[k]] - out[order[k - 1]] >= 15 - 1e-9);
});
