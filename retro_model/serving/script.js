"use strict";
// What the server sends becomes text nodes only, so no text can become part of the page.

const element = (id) => document.getElementById(id);
const SLIDERS = ["temperature", "top-p", "knn", "length"];
let running = null; // the AbortController of what is being written

function make(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function show(state, text, bad = false) {
  state.textContent = text;
  state.classList.toggle("bad", bad);
}

// The answer of the API; throws an Error with the server's line.
async function call(path, options) {
  const response = await fetch(path, options);
  if (!response.ok) {
    const answer = await response.json();
    const again = response.headers.get("Retry-After");
    throw new Error(again ? `busy: ${answer.detail}` : answer.detail);
  }
  return response;
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// ---- a column of text ----

// Writes one answer into a section. Chunks are lists of token texts; a boundary stands between two of them.
class Column {
  constructor(section) {
    this.state = section.querySelector(".state");
    this.text = section.querySelector(".text");
    this.text.replaceChildren();
    this.chunks = [];
  }

  add(chunk, text, className) {
    while (this.chunks.length <= chunk) {
      if (this.chunks.length) this.text.append(this.boundary(this.chunks.length - 1));
      this.chunks.push([]);
    }
    this.chunks[chunk].push(text);
    if (text) this.text.append(make("span", text, className));
  }

  boundary(chunk) {
    const mark = make("span", "\u2502", "boundary");
    mark.title = `end of chunk ${chunk + 1}`;
    return mark;
  }

  found() {}

  async write(request, signal) {
    show(this.state, "waiting \u2026");
    try {
      for await (const event of events(await post("generate", request, signal))) this.take(event);
    } catch (error) {
      const stopped = error.name === "AbortError";
      show(this.state, stopped ? "stopped" : error.message, !stopped);
    }
  }

  take(event) {
    if (event.event === "start") {
      show(this.state, "writing \u2026");
      event.prompt.forEach((chunk, number) => chunk.forEach((text) => this.add(number, text, "prompt-token")));
    } else if (event.event === "token") {
      this.add(event.chunk, event.text, "");
    } else if (event.event === "neighbors") {
      this.found(event);
    } else if (event.event === "end") {
      const reasons = { document: "the model ended the document", tokens: "all new tokens are written",
        length: "as long as the model was trained for" };
      show(this.state, `finished: ${reasons[event.reason]}`);
    } else {
      show(this.state, event.detail, true);
    }
  }
}

// The column with retrieval: a boundary is a button that shows the neighbors of the chunk before it.
class RetrievalColumn extends Column {
  constructor(section) {
    super(section);
    this.neighbors = new Map();
    this.buttons = new Map();
    element("found").replaceChildren();
  }

  boundary(chunk) {
    const button = make("button", `\u2502${chunk + 1}`, "boundary");
    button.type = "button";
    button.title = `end of chunk ${chunk + 1}: show its neighbors`;
    button.addEventListener("click", () => this.choose(chunk));
    this.buttons.set(chunk, button);
    return button;
  }

  found(event) {
    this.neighbors.set(event.chunk, event.neighbors);
    this.choose(event.chunk);
  }

  choose(chunk) {
    for (const [number, button] of this.buttons) button.setAttribute("aria-pressed", String(number === chunk));
    const place = element("found");
    place.replaceChildren(make("h3", `of chunk ${chunk + 1}`));
    const neighbors = this.neighbors.get(chunk) || [];
    if (!neighbors.length) place.append(make("p", "none", "note"));
    for (const neighbor of neighbors) place.append(article(neighbor, this.chunks[chunk]));
  }
}

function article(neighbor, chunk) {
  const { run, tokens, continuation_at: continued } = neighbor;
  const made = make("article");
  const title = make("h3", neighbor.document);
  if (neighbor.live !== null) title.append(" ", make("span", "live", "live"));
  made.append(title);
  const shared = run.length > 1 ? `, shares ${run.length} tokens in a row` : "";
  made.append(make("p", `distance ${neighbor.distance.toFixed(4)}${shared}`, "note"));
  if (run.length > 1) {
    const text = make("p", "in the chunk: ", "note");
    text.append(make("mark", chunk.slice(run.query, run.query + run.length).join("")));
    made.append(text);
  }
  const text = make("p", undefined, "text");
  tokens.forEach((token, number) => {
    if (number === continued) {
      const then = make("span", "\u25b8", "boundary");
      then.title = "its continuation";
      text.append(then);
    }
    const inside = run.length > 1 && number >= run.neighbor && number < run.neighbor + run.length;
    text.append(inside ? make("mark", token) : token);
  });
  made.append(text);
  return made;
}

// ---- the forms ----

function showSliders() {
  for (const name of SLIDERS) element(`${name}-value`).textContent = element(name).value;
}

async function write(submitted) {
  submitted.preventDefault();
  running?.abort();
  const mine = (running = new AbortController());
  element("stop").disabled = false;
  const request = {
    prompt: element("prompt").value,
    temperature: Number(element("temperature").value),
    top_p: Number(element("top-p").value),
    max_new_tokens: Number(element("length").value),
    seed: Number(element("seed").value),
    stream: true,
  };
  const on = new RetrievalColumn(element("on"));
  const off = new Column(element("off"));
  await Promise.all([
    on.write({ ...request, knn: Number(element("knn").value) }, mine.signal),
    off.write({ ...request, knn: 0 }, mine.signal),
  ]);
  if (running === mine) element("stop").disabled = true;
}

async function listDocuments() {
  const documents = await (await call("documents")).json();
  element("documents").replaceChildren(...documents.map((each) => {
    const item = make("li", `${each.name}, ${each.chunks} chunks `);
    const button = make("button", "Remove");
    button.type = "button";
    button.addEventListener("click", () => change("removed", call(`documents/${each.id}`, { method: "DELETE" })));
    item.append(button);
    return item;
  }));
}

async function change(done, answer) {
  try {
    await answer;
    show(element("add-state"), done);
    await listDocuments();
  } catch (error) {
    show(element("add-state"), error.message, true);
  }
}

async function start() {
  for (const name of SLIDERS) element(name).addEventListener("input", showSliders);
  element("form").addEventListener("submit", write);
  element("stop").addEventListener("click", () => running?.abort());
  element("add").addEventListener("submit", (submitted) => {
    submitted.preventDefault();
    const document = { name: element("name").value, text: element("document").value };
    change("added", post("documents", document));
  });
  const health = await (await call("health")).json();
  element("knn").value = health.knn;
  showSliders();
  element("facts").textContent = `${health.database_chunks} chunks of ${health.chunk_size} tokens; ` +
    `at most ${health.most_tokens} tokens a text`;
  await listDocuments();
}

start();
