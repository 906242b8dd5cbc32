// What is fetched, all of it from the TensorBoard that served this page.

export class Failure extends Error {}

async function get(path, parameters, signal) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined && one !== null) query.append(name, one);
    }
  }
  let answer;
  try {
    answer = await fetch(`./${path}?${query}`, { signal, credentials: 'same-origin' });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Failure('TensorBoard does not answer. Is it still running?');
  }
  let data = null;
  try {
    data = await answer.json();
  } catch (error) {
    if (error.name === 'AbortError') throw error;
  }
  if (!answer.ok || data === null) {
    throw new Failure((data && data.error) || `TensorBoard answered with status ${answer.status}.`);
  }
  return data;
}

export const readState = () => get('state', {});
export const readPanel = (parameters, signal) => get('panel', parameters, signal);

let loading = null;

// Parsing it takes longer than all the rest, so it begins at once, beside what is asked for first.
export function loadPlotly() {
  loading ||= new Promise((resolve, reject) => {
    const script = document.createElement('script');
    script.src = './plotly.js';
    script.onload = () => (window.Plotly ? resolve(window.Plotly) : reject(new Failure('plotly did not start.')));
    script.onerror = () => reject(new Failure('plotly could not be loaded.'));
    document.head.append(script);
  });
  loading.catch(() => {}); // told by those who wait for it
  return loading;
}
