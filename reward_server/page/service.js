// What the page asks of the service: fetch with the key, and one kind of error that a person can read.

let key = ""; // lives and dies with this tab

export class Refusal extends Error {
  constructor(status, text, requestId, retryAfterS) {
    super(text);
    this.status = status; // 0: no answer at all
    this.requestId = requestId;
    this.retryAfterS = retryAfterS;
  }
}

export function useKey(text) {
  key = text;
}

/** The served rewards: [{name, checksum, …}]. */
export async function listRewards() {
  return (await ask("v1/models", {})).models;
}

/** One picture under one pair: {request_id, scorer, reward, positive_similarity, negative_similarity, heat_map?}. */
export async function score(request, signal) {
  const { image, ...rest } = request;
  const answer = await ask("v1/score", {
    method: "POST",
    body: JSON.stringify({ images: [image], ...rest }),
    headers: { "content-type": "application/json" },
    signal,
  });
  return { request_id: answer.request_id, scorer: answer.scorer, ...answer.results[0] };
}

async function ask(path, { headers, ...rest }) {
  const authorization = key ? { authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...rest, headers: { ...headers, ...authorization }, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The reward service does not answer. Is it still running?", "", null);
  }
  const text = await response.text();
  const body = parse(text);
  if (response.ok && body) return body;
  const reason = body?.error ?? `the service answered ${response.status} ${response.statusText}`;
  const requestId = body?.request_id ?? response.headers.get("x-request-id") ?? "";
  throw new Refusal(response.status, reason, requestId, response.headers.get("retry-after"));
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null; // a proxy's page, not the service's answer
  }
}
