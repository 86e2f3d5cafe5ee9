// The server: JSON requests, streamed answers, and the key that a guarded server asks for.

const KEY = "dseek-key";
let askForKey = async () => null;

/** Say how a key is asked for: a function that resolves to one. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** What a server answered instead of what was asked for. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Get JSON. */
export async function get(path) {
  const response = await reach(path, {});
  return response.json();
}

/**
 * Stream an answer.
 * @param {object} body a chat completion request
 * @param {AbortSignal} signal stops it
 * @yields {object} chunks
 */
export async function* chat(body, signal) {
  const response = await reach("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError("The connection ended before the answer did.", 0);
      rest += value;
      let end;
      while ((end = rest.indexOf("\n\n")) >= 0) {
        const event = rest.slice(0, end);
        rest = rest.slice(end + 2);
        if (!event.startsWith("data: ")) continue;
        const data = event.slice(6);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message, 0);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function reach(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers };
    if (key) headers.authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached.", 0);
    }
    if (response.ok) return response;
    if (response.status === 401) {
      sessionStorage.removeItem(KEY);
      const given = await askForKey();
      if (given) {
        sessionStorage.setItem(KEY, given);
        continue;
      }
    }
    let message = `The server answered ${response.status}.`;
    try {
      message = (await response.json()).error.message;
    } catch {
      // Not one of the server's own errors.
    }
    throw new ServerError(message, response.status);
  }
}
