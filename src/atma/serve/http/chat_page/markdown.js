// Markdown as elements. Text becomes text nodes alone, never markup, so nothing that a model writes can be run.

const fence = /^\s{0,3}(```+|~~~+)\s*([^\s`]*)[^`]*$/;
const item = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const inline = new RegExp([
  "(`+)(.{1,1000}?)\\1(?!`)", // 1, 2: code
  "\\*\\*(?=\\S)(.{1,1000}?)(?<=\\S)\\*\\*", // 3: bold
  "(?<![*\\w])\\*(?=[^\\s*])(.{1,1000}?)(?<=[^\\s*])\\*(?![*\\w])", // 4: italic
  "(?<![_\\w])_(?=[^\\s_])(.{1,1000}?)(?<=[^\\s_])_(?![_\\w])", // 5: italic
  "~~(?=\\S)(.{1,1000}?)(?<=\\S)~~", // 6: struck out
  "\\[([^\\]]{1,1000})\\]\\((\\w+:(?:[^\\s()]|\\([^\\s()]*\\)){1,2000})\\)", // 7, 8: a link
  "\\\\([\\\\`*_{}\\[\\]()#+.!|~<>-])", // 9: a sign that is meant as it is
].join("|"), "s");

function element(name, ...inside) {
  const made = document.createElement(name);
  made.append(...inside);
  return made;
}

function link(text, address) {
  if (!/^(https?|mailto):/i.test(address)) return document.createTextNode(text);
  const made = element("a", ...spans(text));
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}

function spans(text, depth = 0) {
  const found = [];
  for (let rest = text; rest;) {
    const at = depth < 8 ? inline.exec(rest) : null;
    if (!at) { found.push(document.createTextNode(rest)); break; }
    if (at.index) found.push(document.createTextNode(rest.slice(0, at.index)));
    const within = (name, inner) => element(name, ...spans(inner, depth + 1));
    if (at[1]) found.push(element("code", at[2]));
    else if (at[3]) found.push(within("strong", at[3]));
    else if (at[4] || at[5]) found.push(within("em", at[4] || at[5]));
    else if (at[6]) found.push(within("del", at[6]));
    else if (at[7]) found.push(link(at[7], at[8]));
    else found.push(document.createTextNode(at[9]));
    rest = rest.slice(at.index + at[0].length);
  }
  return found;
}

function codeBlock(lines, language) {
  const code = element("code", lines.join("\n")), block = element("pre", code), copy = element("button", "Copy");
  if (language) block.setAttribute("aria-label", "Code: " + language);
  block.tabIndex = 0;
  copy.type = "button";
  copy.addEventListener("click", () => copied(code.textContent, copy));
  block.append(copy);
  return block;
}

function cells(line) {
  return line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
}

function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  const row = (name, values) => element("tr", ...head.map((_, i) => element(name, ...spans(values[i] ?? ""))));
  return element("table", element("thead", row("th", head)), element("tbody", ...rows.map((one) => row("td", one))));
}

function list(lines, depth) {
  const first = item.exec(lines[0]), ordered = /\d/.test(first[2]), made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(first[2], 10);
  for (let i = 0; i < lines.length;) {
    const head = item.exec(lines[i]), inner = [head[3]], deep = lines[i].length - head[3].length;
    for (i += 1; i < lines.length; i += 1) {
      const next = item.exec(lines[i]);
      if (next && next[1].length <= first[1].length) break;
      inner.push(lines[i].replace(new RegExp(`^\\s{1,${deep}}`), ""));
    }
    const parts = blocks(inner.join("\n"), depth + 1), tight = parts[0]?.nodeName === "P" && !inner.includes("");
    made.append(element("li", ...(tight ? [...parts[0].childNodes, ...parts.slice(1)] : parts)));
  }
  return made;
}

// The lines of a list: what is indented belongs to it, code within whole, and so do blank lines before either.
function listLines(lines, from) {
  let to = from, open = "";
  for (let i = from; i < lines.length; i += 1) {
    const line = lines[i], sign = fence.exec(line.trimStart());
    const own = open || item.test(line) || /^\s+\S/.test(line);
    if (!own && (line.trim() || to < i - 1)) break;
    if (open ? line.trim().startsWith(open) && !sign?.[2] : own && sign && /^\s/.test(line)) open = open ? "" : sign[1];
    if (own) to = i + 1;
  }
  return lines.slice(from, to);
}

// The blocks of a text.
function blocks(text, depth = 0) {
  if (depth > 16) return [document.createTextNode(text)];
  const lines = text.split("\n"), found = [];
  let i = 0;
  const take = (holds) => {
    const from = i;
    while (i < lines.length && holds(lines[i])) i += 1;
    return lines.slice(from, i);
  };
  const rule = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/, heading = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$/, quote = /^\s{0,3}>/;
  const divider = /^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)*\|?\s*$/;
  const isTable = () => lines[i].includes("|") && lines[i + 1]?.includes("|") && divider.test(lines[i + 1]);
  const signs = [fence, heading, rule, item, quote];
  const begins = (line) => !line.trim() || signs.some((one) => one.test(line));
  while (i < lines.length) {
    const line = lines[i], opened = fence.exec(line), head = heading.exec(line);
    if (!line.trim()) { i += 1; continue; }
    if (opened) {
      i += 1;
      found.push(codeBlock(take((one) => !one.trim().startsWith(opened[1]) || fence.exec(one)?.[2]), opened[2]));
      i += 1;
    } else if (head) { i += 1; found.push(element("h" + head[1].length, ...spans(head[2]))); }
    else if (rule.test(line)) { i += 1; found.push(element("hr")); }
    else if (quote.test(line)) {
      const inner = take((one) => quote.test(one)).map((one) => one.replace(/^\s{0,3}> ?/, ""));
      found.push(element("blockquote", ...blocks(inner.join("\n"), depth + 1)));
    } else if (item.test(line)) {
      const own = listLines(lines, i);
      i += own.length;
      found.push(list(own, depth));
    } else if (isTable()) found.push(table(take((one) => one.includes("|"))));
    else {
      const first = i;
      found.push(element("p", ...spans(take((one) => i === first || !begins(one)).join("\n"))));
    }
  }
  return found;
}

// Where the last block of a text begins that more text may change: what is before it stays as it is. A blank line ends
// a block once a whole line follows that cannot belong to a list before it.
function settled(text, from) {
  let at = from, place = from, open = "", ended = -1;
  for (const line of text.slice(from).split("\n").slice(0, -1)) {
    const found = fence.exec(line.trimStart());
    if (!open && !line.trim()) ended = ended < 0 ? place : ended;
    else {
      if (ended > from && !open && !item.test(line) && /^\S/.test(line)) at = ended;
      ended = -1;
      if (open ? line.trim().startsWith(open) && !found?.[2] : found) open = open ? "" : found[1];
    }
    place += line.length + 1;
  }
  return at;
}

// Shows a growing text in an element: only the end is made anew.
function shower(place, formatted) {
  let done = 0, kept = 0, shown = 0;
  place.classList.toggle("plain", !formatted);
  if (!formatted) {
    const node = place.appendChild(document.createTextNode(""));
    return (text) => { node.appendData(text.slice(shown)); shown = text.length; };
  }
  return (text) => {
    while (place.childNodes.length > kept) place.lastChild.remove();
    const next = settled(text, done);
    if (next > done) {
      place.append(...blocks(text.slice(done, next)));
      kept = place.childNodes.length;
      done = next;
    }
    place.append(...blocks(text.slice(done)));
  };
}
