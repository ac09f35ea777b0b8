// What is asked of the server, and how its answers come.

function headers() {
  const key = at("key").value.trim(), json = { "content-type": "application/json" };
  return key ? { ...json, authorization: "Bearer " + key } : json;
}

async function failure(response) {
  if (response.status === 401) { at("keyed").hidden = false; at("key").focus(); }
  try { return (await response.json()).error.message; } catch { return "status " + response.status; }
}

async function models() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  return (await response.json()).data[0];
}

async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the connection ended before the answer did");
      rest += decoder.decode(value, { stream: true });
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        if (part === "data: [DONE]") return;
        yield JSON.parse(part.slice(6));
      }
    }
  } finally { await reader.cancel().catch(() => {}); }
}

// Streams an answer: each piece to `took`, the numbers of tokens to `counted`. Returns why and how fast it ended.
async function ask(route, body, signal, took, counted) {
  const began = performance.now();
  let first = null, pieces = 0, reason = null;
  const response = await fetch(route, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error(await failure(response));
  try {
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) counted(event.usage);
      const choice = event.choices[0], piece = choice?.delta?.content ?? choice?.text;
      reason = choice?.finish_reason ?? reason;
      if (!piece) continue;
      first ??= performance.now();
      pieces += 1;
      took(piece);
    }
  } finally {
    const seconds = (performance.now() - first) / 1000;
    if (first !== null) at("first").textContent = ((first - began) / 1000).toFixed(2) + " s";
    if (pieces > 1 && seconds > 0) at("speed").textContent = ((pieces - 1) / seconds).toFixed(0) + " tokens/s";
  }
  return reason;
}
