// Elements are made here and filled with text, never with markup: names of runs and layers are anybody's.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (name === 'class') made.className = value;
    else made.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) made.append(child);
  }
  return made;
}

// One of a group of buttons is in the tab order; arrows go from one to the next.
export function arrows(group, selector, { vertical = false } = {}) {
  const [back, forth] = vertical ? ['ArrowUp', 'ArrowDown'] : ['ArrowLeft', 'ArrowRight'];
  group.addEventListener('keydown', (event) => {
    const members = [...group.querySelectorAll(selector)];
    const at = members.indexOf(document.activeElement);
    if (at < 0) return;
    const last = members.length - 1;
    const next = { [back]: at ? at - 1 : last, [forth]: at < last ? at + 1 : 0, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    members[next].focus();
    members[next].click();
  });
}

const WORDS = { nan: 'NaN', inf: '∞', '-inf': '−∞' };

export function number(value) {
  if (typeof value === 'string') return WORDS[value] || value;
  if (typeof value !== 'number') return '';
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString('en');
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace('e+', 'e');
  return String(Number(value.toPrecision(4)));
}

// What values are sorted by; numbers may come as text.
export function order(value, type) {
  if (value === null || value === undefined || value === '') return null;
  if (typeof value === 'number' || type === 'text') return value;
  const known = { nan: Infinity, NaN: Infinity, inf: Infinity, '-inf': -Infinity }[value];
  if (known !== undefined) return known;
  const parsed = Number(value);
  return Number.isNaN(parsed) ? value : parsed;
}

// Long dotted names may be broken behind their dots, and only there.
export function breakable(text) {
  if (text.length < 24) return text;
  const parts = text.split(/(?<=[./_])(?=\w)/);
  if (parts.length === 1) return text;
  return element('span', {}, parts.flatMap((part, at) => (at ? [element('wbr'), part] : [part])));
}
