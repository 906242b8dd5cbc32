// All that is known of the page around us. TensorBoard promises none of it, so each look is guarded: where it fails,
// the tab goes on by itself.

const PREFIX = 'p.traindiag.';

function parentWindow() {
  try {
    return window.parent !== window && window.parent.document ? window.parent : null;
  } catch {
    return null; // another origin
  }
}

const outer = parentWindow();

function guarded(look, otherwise) {
  try {
    return look();
  } catch {
    return otherwise;
  }
}

const preference = window.matchMedia('(prefers-color-scheme: dark)');

export function isDark() {
  if (!outer) return preference.matches;
  return guarded(() => outer.document.body.classList.contains('dark-mode'), preference.matches);
}

export function onTheme(changed) {
  if (!outer) {
    preference.addEventListener('change', changed);
    return;
  }
  guarded(() => {
    new MutationObserver(changed).observe(outer.document.body, { attributes: true, attributeFilter: ['class'] });
  });
}

// A tab that is not chosen keeps its frame, made invisible by its style.
export function isVisible() {
  if (document.hidden) return false;
  return guarded(() => {
    const frame = window.frameElement;
    if (!frame) return true;
    const style = outer.getComputedStyle(frame);
    return style.visibility !== 'hidden' && style.display !== 'none' && frame.getBoundingClientRect().height > 0;
  }, true);
}

// The link is "#traindiag&p.traindiag.run=a&p.traindiag.panel=attention". On a first load TensorBoard hands its
// plugins nothing of it, so it is read here; names without the prefix are taken too.
export function readLink() {
  const link = {};
  const hash = guarded(() => (outer || window).location.hash, '');
  const [tab, ...parts] = hash.replace(/^#/, '').split('&');
  if (tab !== 'traindiag' && tab !== '') return link;
  for (const part of parts) {
    const at = part.indexOf('=');
    if (at < 0) continue;
    const key = guarded(() => decodeURIComponent(part.slice(0, at)), '');
    const value = guarded(() => decodeURIComponent(part.slice(at + 1)), '');
    const name = key.startsWith(PREFIX) ? key.slice(PREFIX.length) : key;
    if (name === 'run') (link.runs ||= []).push(value);
    else if (name) link[name] = value;
  }
  return link;
}

export function writeLink(values) {
  const target = outer || window;
  guarded(() => {
    if (outer && !target.location.hash.startsWith('#traindiag')) return; // another tab is in front
    const parts = [];
    for (const [name, value] of Object.entries(values)) {
      for (const one of Array.isArray(value) ? value : [value]) {
        if (one !== undefined && one !== null && one !== '') {
          parts.push(`${PREFIX}${name}=${encodeURIComponent(one)}`);
        }
      }
    }
    const hash = ['#traindiag', ...parts].join('&');
    if (hash !== target.location.hash) target.history.replaceState(target.history.state, '', hash);
  });
}

export function onLink(changed) {
  guarded(() => (outer || window).addEventListener('hashchange', changed));
}

export function runFilter() {
  const text = guarded(() => new URLSearchParams(outer.location.search).get('runFilter'), null);
  return text ? guarded(() => new RegExp(text), null) : null;
}

// TensorBoard publishes no library for this; a message is {type, id, payload, error, isReply} as JSON on a port.
export function onReload(reload) {
  guarded(() => {
    if (!outer) return;
    const channel = new MessageChannel();
    channel.port1.onmessage = (event) => {
      const message = guarded(() => JSON.parse(event.data), null);
      if (!message || message.isReply) return;
      if (message.type === 'experimental.DataReloaded') reload();
      const reply = { type: message.type, id: message.id, payload: null, error: null, isReply: true };
      channel.port1.postMessage(JSON.stringify(reply));
    };
    outer.postMessage('experimental.bootstrap', '*', [channel.port2]);
  });
}
