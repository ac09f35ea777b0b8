// A talk is a tree of turns: what is written anew or answered again stands beside what was there, and either is chosen.

class Talk {
  constructor(kept) {
    this.root = { role: "", text: "", children: [], chosen: 0, note: "" };
    if (kept) this.root.children = kept.children, this.root.chosen = kept.chosen;
    this.link(this.root);
  }

  link(turn) {
    for (const child of turn.children) { Object.defineProperty(child, "parent", { value: turn }); this.link(child); }
  }

  // The turns that are chosen, the first first.
  path() {
    const found = [];
    for (let turn = this.root; turn.children.length;) found.push(turn = turn.children[turn.chosen]);
    return found;
  }

  last() { return this.path().at(-1) ?? this.root; }

  add(parent, role, text) {
    const turn = { role, text, children: [], chosen: 0, note: "" };
    Object.defineProperty(turn, "parent", { value: parent });
    Object.defineProperty(turn, "before", { value: parent.chosen });
    parent.chosen = parent.children.push(turn) - 1;
    return turn;
  }

  drop(turn) {
    const all = turn.parent.children;
    all.splice(all.indexOf(turn), 1);
    turn.parent.chosen = Math.min(turn.before, Math.max(0, all.length - 1));
  }

  choose(turn, step) {
    const { parent } = turn;
    parent.chosen = Math.min(parent.children.length - 1, Math.max(0, parent.children.indexOf(turn) + step));
  }
}
