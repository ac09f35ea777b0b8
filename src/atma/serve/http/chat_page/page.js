// The page: a talk shown, and what its buttons do.

const numbers = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
  "frequency_penalty", "max_tokens", "seed"];
const kept = [...numbers, "system", "stops", "theme"];
const begun = Object.fromEntries(kept.map((name) => [name, at(name).value]));
const talks = { chat: new Talk(), text: new Talk() }, views = new WeakMap();
const edits = new Map(); // turns that are being written anew, and what has been written so far
let running = null, card = {}, chosen = false;

const mode = () => (at("text").checked ? "text" : "chat");
const current = () => talks[mode()];

function recall(store, name) { try { return JSON.parse(store.getItem(name)); } catch { return null; } }

// A browser may have no store, or no room in it.
function keep(store, name, value) { try { store.setItem(name, JSON.stringify(value)); } catch { return; } }

function keepSettings() {
  const values = Object.fromEntries(kept.map((name) => [name, at(name).value]));
  keep(localStorage, "atma settings", { ...values, formatted: at("formatted").checked });
}

function keepTalks() {
  keep(sessionStorage, "atma talks", { mode: mode(), chat: talks.chat.root, text: talks.text.root });
}

function begin() {
  const settings = recall(localStorage, "atma settings") ?? {}, before = recall(sessionStorage, "atma talks");
  for (const name of kept) if (typeof settings[name] === "string") at(name).value = settings[name];
  if (settings.formatted === false) at("formatted").checked = false;
  if (before) {
    chosen = at(before.mode === "text" ? "text" : "chat").checked = true;
    for (const name of ["chat", "text"]) talks[name] = new Talk(before[name]);
  }
  document.documentElement.style.colorScheme = at("theme").value;
  draw();
}

async function greet() {
  try {
    const model = await models(), known = model.max_model_len !== undefined;
    at("model").textContent = document.title = model.id;
    at("state").textContent = known ? "ready" : "loading";
    at("room").textContent = known ? " of " + model.max_model_len.toLocaleString("en") : "";
    if (!known) { setTimeout(greet, 1000); return; }
    card = model;
    at("about").textContent = (model.description ?? []).join(" · ");
    if (!chosen) at(model.chat_template === false ? "text" : "chat").checked = true;
    draw();
  } catch (error) {
    const lost = error instanceof TypeError;
    at("state").textContent = lost ? "no answer from the server" : error.message;
    if (lost) setTimeout(greet, 3000);
  }
}

// Shows the chosen turns anew.
function draw() {
  const path = current().path(), chat = mode() === "chat";
  for (const article of [...at("talk").querySelectorAll("article")]) article.remove();
  for (const turn of path) { show(turn); if (edits.has(turn)) rewriting(turn); }
  at("talk").className = mode();
  at("instructed").hidden = !chat;
  at("input").placeholder = chat ? "Message" : "Text (Ctrl+Enter: continue)";
  at("input").ariaLabel = chat ? "Message" : "Text";
  at("send").textContent = chat ? "Send" : "Continue";
  at("hint").hidden = path.length > 0;
  at("hint").textContent = hint(chat);
  at("talk").scrollTop = at("talk").scrollHeight;
}

function hint(chat) {
  const states = " What was read before is not read again: the server keeps the model's state, and shows below how " +
    "many tokens that saved.";
  if (!chat) return "Write the beginning of a text, and the model goes on from it." + states;
  if (card.chat_template === false) {
    return "This model has no chat template: it continues texts and was not taught to answer, so its answers may be " +
      "odd, or empty. Under Settings, choose to continue a text.";
  }
  return "Say something." + states;
}

function button(name, act, label) {
  const made = element("button", name);
  made.type = "button";
  made.ariaLabel = label ?? name;
  made.addEventListener("click", act);
  return made;
}

async function copied(text, place) {
  const before = place.textContent;
  try {
    await navigator.clipboard.writeText(text);
    place.textContent = "Copied";
  } catch { place.textContent = "Not allowed"; }
  setTimeout(() => { place.textContent = before; }, 1500);
}

function show(turn) {
  const article = element("article"), text = element("div"), own = turn.role === "user", chat = mode() === "chat";
  const paint = shower(text, !own && chat && at("formatted").checked);
  article.className = turn.role;
  article.ariaLabel = own ? "You" : "Model";
  article.append(text);
  text.classList.add("text");
  views.set(turn, { article, paint: () => paint(chat ? turn.text.trimStart() : turn.text) });
  views.get(turn).paint();
  finish(turn);
  at("talk").append(article);
}

// Below a turn: how it ended, and what can be done with it.
function finish(turn) {
  const { article } = views.get(turn);
  for (const old of article.querySelectorAll(":scope > .note, :scope > .tools")) old.remove();
  if (turn.note) { const note = element("p", turn.note); note.className = "note"; article.append(note); }
  if (running?.turn === turn) return;
  const tools = element("div"), { children } = turn.parent, place = children.indexOf(turn);
  tools.className = "tools";
  const copy = button("Copy", () => copied(turn.text, copy));
  tools.append(copy, button("Edit", () => edit(turn)));
  if (turn.role === "assistant") tools.append(button("Regenerate", () => again(turn)));
  if (children.length > 1) {
    const step = (sign, by, label) => {
      const made = button(sign, () => { if (!running) { current().choose(turn, by); keepTalks(); draw(); } }, label);
      made.disabled = place + by < 0 || place + by >= children.length;
      return made;
    };
    tools.append(step("‹", -1, "Version before"), `${place + 1} of ${children.length}`, step("›", 1, "Next version"));
  }
  article.append(tools);
}

function edit(turn) {
  if (running) return;
  edits.set(turn, edits.get(turn) ?? turn.text);
  rewriting(turn).focus();
}

// A turn that is being written anew, in place of its text.
function rewriting(turn) {
  const { article } = views.get(turn), box = element("textarea"), tools = element("div");
  box.value = edits.get(turn);
  box.ariaLabel = "New text";
  box.rows = Math.min(12, box.value.split("\n").length + 1);
  const leave = () => { edits.delete(turn); draw(); };
  const save = () => {
    if (running) return;
    const written = current().add(turn.parent, turn.role, box.value);
    leave();
    keepTalks();
    if (turn.role === "user") reply(written);
  };
  box.addEventListener("input", () => edits.set(turn, box.value));
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); leave(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); save(); }
  });
  tools.className = "tools";
  tools.append(button(turn.role === "user" ? "Save and send" : "Save", save), button("Cancel", leave));
  article.replaceChildren(box, tools);
  return box;
}

function again(turn) { if (!running) reply(turn.parent); }

function body(path) {
  const asked = {}, stops = at("stops").value.split("\n").filter(Boolean), system = at("system").value.trim();
  for (const name of numbers) if (at(name).value !== "") asked[name] = Number(at(name).value);
  if (stops.length) asked.stop = stops;
  if (mode() === "text") asked.prompt = path.map((turn) => turn.text).join("");
  else {
    const messages = [];
    for (const { role, text } of path.filter((turn) => turn.text)) { // where no answer came, questions go together
      if (messages.at(-1)?.role === role) messages.at(-1).content += "\n\n" + text;
      else messages.push({ role, content: text });
    }
    asked.messages = system ? [{ role: "system", content: system }, ...messages] : messages;
  }
  return { ...asked, stream: true, stream_options: { include_usage: true } };
}

function figures(usage) {
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  at("context").textContent = usage.total_tokens.toLocaleString("en");
  at("saved").textContent = cached.toLocaleString("en");
  at("share").textContent = "of " + usage.prompt_tokens.toLocaleString("en") + " read (" +
    Math.round(100 * cached / Math.max(1, usage.prompt_tokens)) + "%)";
}

// Paints a turn once a frame at most, and follows its end where that is in sight.
function painter(turn) {
  let asked = 0;
  const paint = () => {
    cancelAnimationFrame(asked);
    asked = 0;
    const place = at("talk"), below = place.scrollHeight - place.scrollTop - place.clientHeight < 80;
    views.get(turn).paint();
    if (below) place.scrollTop = place.scrollHeight;
  };
  return { paint, later: () => { asked ||= requestAnimationFrame(paint); } };
}

function told(turn, reason) {
  if (!turn.text.trim()) {
    return "The model ended here at once: its first token was the end. Another seed, a higher temperature or another " +
      "beginning may give more.";
  }
  return reason === "length" ? "Cut at the longest answer; Settings has its length." : "";
}

// Lets the model go on behind a turn. What it says is a new turn beside any that were there.
async function reply(parent) {
  const talk = current(), path = talk.path();
  const asked = body(path.slice(0, path.indexOf(parent) + 1));
  const route = mode() === "text" ? "v1/completions" : "v1/chat/completions", turn = talk.add(parent, "assistant", "");
  running = Object.assign(new AbortController(), { turn, talk });
  at("send").disabled = true;
  at("stop").hidden = false;
  draw();
  keepTalks();
  const { paint, later } = painter(turn), keeping = setInterval(keepTalks, 1000);
  try {
    const took = (piece) => { turn.text += piece; later(); };
    turn.note = told(turn, await ask(route, asked, running.signal, took, figures));
  } catch (error) {
    if (error.name === "AbortError") turn.note = "Stopped.";
    else fail(talk, turn, error.message);
  }
  clearInterval(keeping);
  running = null;
  at("send").disabled = false;
  at("stop").hidden = true;
  finish(turn);
  paint();
  at("spoken").textContent = turn.text.slice(0, 2000);
  keepTalks();
  at("input").focus();
}

// An answer that did not come: what was asked goes back where it was written.
function fail(talk, turn, message) {
  if (talk !== current()) { turn.note = message; return; }
  const { parent } = turn;
  if (!turn.text) {
    talk.drop(turn);
    if (parent.role === "user" && !parent.children.length) {
      if (!at("input").value) at("input").value = parent.text;
      talk.drop(parent);
    }
    draw();
  }
  const article = element("article", message);
  article.className = "error";
  article.setAttribute("role", "alert");
  at("talk").append(article);
  at("talk").scrollTop = at("talk").scrollHeight;
}

function send() {
  const text = mode() === "chat" ? at("input").value.trim() : at("input").value, last = current().last();
  if (running || (!text && (mode() === "chat" || last === current().root))) return;
  at("input").value = "";
  reply(text ? current().add(last, "user", text) : last);
}

function switched() { chosen = true; keepTalks(); draw(); }

at("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("input").addEventListener("keydown", (event) => {
  const go = mode() === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && go && !event.isComposing) { event.preventDefault(); send(); }
  const own = current().path().filter((turn) => turn.role === "user").at(-1);
  if (event.key === "ArrowUp" && !at("input").value && own) { event.preventDefault(); edit(own); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
at("stop").addEventListener("click", () => running?.abort());
at("fresh").addEventListener("click", () => {
  if (running?.talk === current()) running.abort();
  talks[mode()] = new Talk();
  keepTalks();
  for (const name of ["context", "saved"]) at(name).textContent = "0";
  for (const name of ["first", "speed"]) at(name).textContent = "–";
  at("share").textContent = "";
  draw();
  at("input").focus();
});
for (const name of ["chat", "text"]) at(name).addEventListener("change", switched);
for (const name of kept) at(name).addEventListener("change", keepSettings);
at("formatted").addEventListener("change", () => { keepSettings(); draw(); });
at("theme").addEventListener("change", () => { document.documentElement.style.colorScheme = at("theme").value; });
at("defaults").addEventListener("click", () => {
  for (const name of kept) at(name).value = begun[name];
  document.documentElement.style.colorScheme = at("theme").value;
  keepSettings();
});
at("key").addEventListener("change", greet);
begin();
at("input").focus();
greet();
