// The status view: what /status says, every two seconds while it is looked at.
"use strict";

const HISTORY = 90;
const seen = { tokens: [], depth: [] };
let before = null;

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return value ? `${value.toPrecision(3)} ${units[unit]}` : "0";
}

function remember(list, value) {
  list.push(value);
  if (list.length > HISTORY) list.shift();
}

function chart(canvas, values) {
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const probe = (name) => { canvas.style.color = `var(${name})`; return getComputedStyle(canvas).color; };
  const top = Math.max(1, ...values);
  const x = (index) => 34 + (index / (HISTORY - 1)) * (width - 38);
  const y = (value) => height - 6 - (value / top) * (height - 16);
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = probe("--soft");
  pen.strokeStyle = probe("--line");
  for (const share of [0, 0.5, 1]) {
    const value = top * share;
    pen.fillText(value >= 10 ? Math.round(value) : Number(value.toPrecision(2)), 2, y(value) + 4);
    pen.beginPath();
    pen.moveTo(34, y(top * share));
    pen.lineTo(width, y(top * share));
    pen.stroke();
  }
  pen.strokeStyle = probe("--mark");
  pen.lineWidth = 2;
  pen.beginPath();
  values.forEach((value, index) => pen.lineTo(x(HISTORY - values.length + index), y(value)));
  pen.stroke();
}

function bar(share, title) {
  const fill = element("div", [], { className: share > 0.9 ? "high" : "" });
  fill.style.width = `${Math.min(100, 100 * share)}%`;
  return element("div", [fill], { className: "bar", title });
}

function tierRow(tier, budget) {
  const open = tier.circuit !== "closed";
  const kind = open ? "bad" : tier.state === "ready" ? "good" : tier.state === "failed" ? "bad" : "warn";
  const state = open ? `circuit ${tier.circuit.replace("_", " ")}` : tier.state;
  const held = tier.resident || tier.memory;
  const facts = [`${tier.engine}`, `${tier.bits} bit`];
  const gpu = tier.gpu_memory.map((size, number) => (size ? `${bytes(size)} of GPU ${number}` : "")).filter(Boolean);
  if (tier.kl !== null) facts.push(`KL ${Number(tier.kl.toPrecision(2))}`);
  if (tier.ewma_ttft !== null) facts.push(`first token ${(tier.ewma_ttft * 1000).toFixed(0)} ms`);
  if (tier.restarts) facts.push(`${tier.restarts} restarts`);
  return element("div", [
    element("div", [element("strong", [tier.name]), tier.pinned ? " 📌" : ""]),
    element("div", [element("span", [state], { className: `pill ${tier.state === "cold" && !open ? "" : kind}`, title: tier.reason })]),
    element("div", [bar(budget ? held / budget : 0, `${bytes(held)} held, ${bytes(tier.planned)} planned`),
      element("span", [[`${bytes(held)} of ${bytes(tier.planned)} planned`, ...gpu].join(" · ")], { className: "facts" })]),
    element("div", [`${tier.in_flight} in flight`, element("br"), facts.join(" · ")], { className: "facts" }),
  ], { className: "tier" });
}

async function refreshStatus(visible) {
  let now;
  try {
    const answer = await fetch("status");
    if (!answer.ok) throw new Error(answer.statusText);
    now = await answer.json();
  } catch {
    readiness("unreachable", "bad");
    return;
  }
  readiness(now.ready ? "ready" : "loading", now.ready ? "good" : "warn");
  const time = performance.now();
  const depth = now.models.reduce((sum, model) => sum + model.queued + model.tiers.reduce((n, tier) => n + tier.in_flight, 0), 0);
  if (before) remember(seen.tokens, Math.max(0, (now.tokens - before.tokens) / ((time - before.time) / 1000)));
  remember(seen.depth, depth);
  before = { tokens: now.tokens, time };
  if (!visible) return;
  document.getElementById("rate").textContent = (seen.tokens.at(-1) ?? 0).toFixed(1);
  document.getElementById("depth").textContent = depth;
  chart(document.getElementById("tokens-chart"), seen.tokens);
  chart(document.getElementById("queue-chart"), seen.depth);
  document.getElementById("memory").replaceChildren(
    ...[{ ...now, name: "Memory" }, ...now.gpus.map((gpu, number) => ({ ...gpu, name: `GPU ${number}` }))].flatMap((pool) => [
      element("h2", [`${pool.name}: ${bytes(pool.memory)} of ${bytes(pool.memory_budget)}`]),
      bar(pool.memory_budget ? pool.memory / pool.memory_budget : 0, "planned memory of loaded tiers"),
    ]));
  document.getElementById("models").replaceChildren(...now.models.map((model) => element("div", [
    element("h2", [model.name, element("span", [
      ` ${model.kind}${model.queued ? ` · ${model.queued} queued` : ""}${model.level ? ` · degraded by ${model.level}` : ""}`,
    ], { className: "facts" })]),
    ...model.tiers.map((tier) => tierRow(tier, now.memory_budget)),
  ], { className: "card" })));
}

function readiness(text, kind) {
  const pill = document.getElementById("ready");
  pill.textContent = text;
  pill.className = `pill ${kind}`;
}
