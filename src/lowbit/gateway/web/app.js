// Chat and comparison, through the same routes that every client uses.
"use strict";

const find = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const talks = { 0: [], 1: [], 2: [] };
let view = "chat";
let running = [];

function show(name) {
  view = name;
  for (const section of all(".view")) section.hidden = section.id !== name;
  for (const tab of all("nav button")) tab.setAttribute("aria-selected", String(tab.dataset.view === name));
  find("#composer").hidden = name === "status";
  find("#composer .model").hidden = name === "compare";
  if (name === "status") refreshStatus(true);
}

async function loadModels() {
  const answer = await fetch("v1/models");
  const models = (await answer.json()).data.filter((model) => model.lowbit.kind === "chat");
  for (const select of all("select.model")) {
    const chosen = select.value;
    select.replaceChildren(...models.map((model) => {
      const kl = model.lowbit.kl;
      const note = model.lowbit.tier ? (kl === null ? "" : `  (KL ${Number(kl.toPrecision(2))})`) : "  (chosen for you)";
      return element("option", [model.id + note], { value: model.id });
    }));
    const wanted = models.findIndex((model) => model.id === chosen);
    const tiers = models.map((model, index) => [model, index]).filter(([model]) => model.lowbit.tier);
    const side = Number(select.dataset.side);
    select.selectedIndex = wanted >= 0 ? wanted : side === 0 ? 0 : (tiers[Math.min(side, tiers.length) - 1] ?? [0, 0])[1];
  }
}

function settings() {
  const body = {};
  for (const input of all("#controls input")) {
    if (input.value !== "") body[input.name] = Number(input.value);
  }
  return body;
}

function addMessage(side, role, text) {
  const log = find(`.log[data-side="${side}"]`);
  const content = element("div", role === "user" ? [text] : [], { className: "text" });
  const message = element("div", [content], { className: `message ${role}` });
  log.append(message);
  follow(log, true);
  return message;
}

function follow(log, always) {
  const area = log.closest(".view");
  if (always || area.scrollHeight - area.scrollTop - area.clientHeight < 120) area.scrollTop = area.scrollHeight;
}

// The JSON of a stream's events, one at a time.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer(side, model) {
  const talk = talks[side];
  const message = addMessage(side, "assistant", "");
  message.classList.add("busy");
  const content = message.firstChild;
  const about = element("div", [], { className: "about" });
  message.append(about);
  const stopper = new AbortController();
  running.push(stopper);
  const system = find("#controls textarea").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...talk];
  const started = performance.now();
  let text = "", thinking = "", tokens = 0, first = 0, facts = [], due = false;
  const thoughts = element("div", [], { className: "thinking", hidden: true });
  message.prepend(thoughts);
  const draw = () => {
    due = false;
    content.replaceChildren(...markdown(text));
    thoughts.hidden = !thinking;
    thoughts.textContent = thinking;
    const seconds = (performance.now() - (first || performance.now())) / 1000;
    const speed = tokens > 1 && seconds > 0 ? [`${((tokens - 1) / seconds).toFixed(1)} tokens/s`] : [];
    const begun = first ? [`first token ${(first - started).toFixed(0)} ms`] : [];
    about.textContent = [...facts, ...begun, `${tokens} tokens`, ...speed].join(" · ");
    follow(find(`.log[data-side="${side}"]`), false);
  };
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model, messages, stream: true, ...settings() }),
      signal: stopper.signal,
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    const kl = reply.headers.get("x-lowbit-kl");
    facts = [`${reply.headers.get("x-lowbit-model")}@${reply.headers.get("x-lowbit-tier")}`, ...(kl ? [`KL ${Number(Number(kl).toPrecision(2))}`] : [])];
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      if (delta.content || delta.reasoning_content) {
        first ||= performance.now();
        tokens += 1;
        text += delta.content ?? "";
        thinking += delta.reasoning_content ?? "";
        if (!due) { due = true; requestAnimationFrame(draw); }
      }
    }
    draw();
  } catch (error) {
    draw();
    const stopped = error.name === "AbortError";
    message.append(element("div", [stopped ? "stopped" : error.message], { className: stopped ? "about" : "error" }));
  } finally {
    message.classList.remove("busy");
    running = running.filter((each) => each !== stopper);
    if (text) talk.push({ role: "assistant", content: text });
    else talk.pop();
  }
}

async function send() {
  const prompt = find("#prompt").value.trim();
  if (!prompt || running.length) return;
  find("#prompt").value = "";
  find("#controls").open = false;
  const sides = view === "compare" ? [1, 2] : [0];
  find("#send").hidden = true;
  find("#stop").hidden = false;
  await Promise.all(sides.map((side) => {
    talks[side].push({ role: "user", content: prompt });
    addMessage(side, "user", prompt);
    return answer(side, find(`select.model[data-side="${side}"]`).value);
  }));
  find("#send").hidden = false;
  find("#stop").hidden = true;
  find("#prompt").focus();
}

function stop() {
  for (const stopper of running) stopper.abort();
}

function clear() {
  stop();
  for (const side of view === "compare" ? [1, 2] : [0]) {
    talks[side].length = 0;
    find(`.log[data-side="${side}"]`).replaceChildren();
  }
}

function theme(value) {
  if (value) document.documentElement.dataset.theme = value;
  localStorage.setItem("lowbit-theme", value ?? "");
  if (view === "status") refreshStatus(true);
}

for (const tab of all("nav button")) tab.addEventListener("click", () => show(tab.dataset.view));
find("#composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
find("#prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  if (event.key === "Escape") stop();
});
find("#stop").addEventListener("click", stop);
find("#clear").addEventListener("click", clear);
find("#theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  theme(now === "dark" ? "light" : "dark");
});
const kept = localStorage.getItem("lowbit-theme");
if (kept) document.documentElement.dataset.theme = kept;
loadModels().catch((error) => addMessage(0, "assistant", "").append(element("div", [error.message], { className: "error" })));
refreshStatus(false);
setInterval(() => { if (!document.hidden) refreshStatus(view === "status"); }, 2000);
