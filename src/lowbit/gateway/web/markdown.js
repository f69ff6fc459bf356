// Markdown as DOM nodes: text never becomes HTML, so no answer of a model can put anything else into the page.
"use strict";

const INLINE = /(`+)([\s\S]+?)\1|\*\*([\s\S]+?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;

function element(name, children = [], attributes = {}) {
  const made = document.createElement(name);
  Object.assign(made, attributes);
  made.append(...children);
  return made;
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (match[2] !== undefined) nodes.push(element("code", [match[2].trim()]));
    else if (match[3] !== undefined) nodes.push(element("strong", inline(match[3])));
    else if (match[4] !== undefined) nodes.push(element("em", inline(match[4])));
    else nodes.push(element("a", [match[5]], { href: match[6], target: "_blank", rel: "noreferrer noopener" }));
  }
  nodes.push(text.slice(end));
  return nodes.filter((node) => node !== "");
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

// One block from the head of `lines`: [node, lines used].
function block(lines) {
  const fence = /^\s*(```+|~~~+)/.exec(lines[0]);
  if (fence) {
    let end = lines.findIndex((line, index) => index > 0 && line.trim().startsWith(fence[1]));
    if (end < 0) end = lines.length;
    return [element("pre", [element("code", [lines.slice(1, end).join("\n")])]), end + 1];
  }
  const heading = /^(#{1,6})\s+(.*)$/.exec(lines[0]);
  if (heading) return [element(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2])), 1];
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(lines[0])) return [element("hr"), 1];
  if (/^\|.*\|/.test(lines[0]) && /^\|?[\s:|-]+\|?$/.test(lines[1] || "")) {
    const used = 2 + count(lines.slice(2), (line) => /^\|/.test(line));
    const row = (name) => (line) => element("tr", cells(line).map((cell) => element(name, inline(cell))));
    return [element("table", [row("th")(lines[0]), ...lines.slice(2, used).map(row("td"))]), used];
  }
  for (const [name, mark] of [["ul", /^\s*[-*+]\s+/], ["ol", /^\s*\d+[.)]\s+/]]) {
    if (!mark.test(lines[0])) continue;
    const used = count(lines, (line) => mark.test(line) || /^\s{2,}\S/.test(line));
    const items = [];
    for (const line of lines.slice(0, used)) {
      if (mark.test(line)) items.push(line.replace(mark, ""));
      else items[items.length - 1] += "\n" + line.trim();
    }
    const start = name === "ol" ? { start: parseInt(lines[0], 10) } : {};
    return [element(name, items.map((item) => element("li", inline(item))), start), used];
  }
  if (/^>/.test(lines[0])) {
    const used = count(lines, (line) => /^>/.test(line));
    return [element("blockquote", markdown(lines.slice(0, used).map((line) => line.replace(/^>\s?/, "")).join("\n"))), used];
  }
  const used = 1 + count(lines.slice(1), (line) => line.trim() !== "" && !/^(\s*(```|~~~)|#{1,6}\s|>|\s*[-*+]\s|\s*\d+[.)]\s)/.test(line));
  return [element("p", inline(lines.slice(0, used).join("\n"))), used];
}

function count(lines, wanted) {
  const end = lines.findIndex((line) => !wanted(line));
  return end < 0 ? lines.length : end;
}

function markdown(text) {
  const lines = text.replace(/\r\n/g, "\n").split("\n");
  const nodes = [];
  while (lines.length) {
    if (lines[0].trim() === "") { lines.shift(); continue; }
    const [node, used] = block(lines);
    nodes.push(node);
    lines.splice(0, used);
  }
  return nodes;
}
