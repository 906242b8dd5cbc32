// The tab "Training diagnostics": which runs and panel are shown, and when they are asked for anew.

import { loadPlotly, readPanel, readState } from './api.js';
import { arrows, element } from './dom.js';
import { Board } from './draw.js';
import { isDark, isVisible, onLink, onReload, onTheme, readLink, runFilter, writeLink } from './host.js';

const POLL_MS = 5000;
const MOST_COMPARED = 20;
const HELP =
  'A file that was cut off or damaged is read as far as it goes. The end of a file that is still being written comes ' +
  'with the next look; anything else is lost unless there is another copy of the file.';

const shown = {
  panel: 'overview',
  runs: new Set(), // names; empty until they are known
  options: {}, // step, layer, cell, ...: what the panels can be asked for
};
let state = null;
let failure = null;
let lastKey = '';
let asking = null; // aborts the request that is under way
let page = null;
let board = null;

export async function render() {
  document.documentElement.lang = 'en';
  document.head.append(
    element('link', { rel: 'stylesheet', href: './static/style.css' }),
    element('meta', { name: 'viewport', content: 'width=device-width' }),
  );
  document.title = 'Training diagnostics';
  loadPlotly();
  page = frame();
  document.body.replaceChildren(page.root);
  board = new Board(page.board, {
    plotly: loadPlotly,
    charts: () => state && state.charts,
    options: () => shown.options,
    go,
    choose,
    chosen: remember,
    filter,
  });
  theme();
  onTheme(() => {
    theme();
    show();
  });
  onReload(() => refresh({ always: true }));
  onLink(() => {
    follow(readLink());
    if (!state) return;
    settle();
    drawTabs();
    drawRuns();
    show();
  });
  document.addEventListener('visibilitychange', () => isVisible() && refresh());
  follow(readLink());
  page.board.append(element('p', { class: 'faint' }, 'Reading the log …'));
  await refresh();
  poll();
}

function poll() {
  setTimeout(async () => {
    if (isVisible()) await refresh();
    poll();
  }, POLL_MS);
}

function theme() {
  document.documentElement.dataset.theme = isDark() ? 'dark' : 'light';
}

// --- what is shown -------------------------------------------------------------------------------------------------

function follow(link) {
  const { panel, runs, ...options } = link;
  if (panel) shown.panel = panel;
  if (runs) shown.runs = new Set(runs);
  if (options.layer && !options.cell) options.cell = options.layer;
  delete options.layer;
  shown.options = options;
}

function remember() {
  writeLink({ run: [...shown.runs], panel: shown.panel, ...shown.options });
}

function go(target) {
  const { panel, run, ...options } = target;
  if (panel) shown.panel = panel;
  if (run && !shown.runs.has(run)) shown.runs = new Set([run]);
  const { severity } = shown.options; // what is filtered stays filtered
  shown.options = Object.fromEntries(
    Object.entries({ severity, ...options }).filter(([, v]) => v !== null && v !== undefined),
  );
  remember();
  drawTabs();
  show();
  page.main.scrollTop = 0;
  page.tabs.querySelector('[aria-selected="true"]')?.focus({ preventScroll: true });
}

// A control of one figure: only that figure is asked for, of all runs that are shown. While a request is under way the latest wish waits.
let wish = null;
let granting = false;

async function choose(option, value, block) {
  const slides = block.controls.find((c) => c.option === option && c.kind === 'slider');
  if (slides && value === slides.values.at(-1)) delete shown.options[option]; // the end moves on with the run
  else shown.options[option] = value;
  wish = block;
  if (granting) return;
  granting = true;
  try {
    while (wish) {
      const of = wish;
      wish = null;
      const content = await readPanel({ ...query(), block: plain(of) });
      for (const one of content.blocks) await board.redraw(content.panel, one);
    }
  } catch (error) {
    tell(error);
  } finally {
    granting = false;
  }
}

// The table filters itself; the marks over the loss are asked for anew.
function filter(levels) {
  if (levels.length === 3) delete shown.options.severity;
  else shown.options.severity = levels.join() || 'none';
  remember();
  show({ always: true });
}

// Several runs have numbers in front of the ids of their blocks.
const plain = (block) => (block.run ? block.id.replace(/^\d+-/, '') : block.id);

function selected() {
  const names = state.runs.map((r) => r.name);
  const chosen = names.filter((n) => shown.runs.has(n));
  if (shown.panel === 'compare' && chosen.length < 2) return names.slice(0, MOST_COMPARED);
  return chosen;
}

function query() {
  return { panel: shown.panel, theme: isDark() ? 'dark' : 'light', run: selected(), ...shown.options };
}

// --- fetching --------------------------------------------------------------------------------------------------------

async function refresh({ always = false } = {}) {
  try {
    const before = state && state.panels.length;
    state = await readState();
    failure = null;
    settle();
    if (before !== state.panels.length) drawTabs();
    drawRuns();
    drawProblems();
    await show({ always });
    status();
  } catch (error) {
    tell(error);
  }
}

// Names of folders in a link stand for their run; what is gone is let go; something is always chosen.
function settle() {
  const named = new Set();
  for (const name of shown.runs) {
    const run = state.runs.find((r) => r.name === name || r.folders.includes(name));
    if (run) named.add(run.name);
  }
  if (!named.size && state.runs.length) {
    const wanted = runFilter();
    const fitting = state.runs.filter((r) => !wanted || r.folders.some((f) => wanted.test(f)));
    named.add((fitting.at(-1) || state.runs.at(-1)).name);
  }
  shown.runs = named;
  if (state.panels.length && !state.panels.some((p) => p.id === shown.panel)) shown.panel = state.panels[0].id;
}

async function show({ always = false } = {}) {
  if (!state) return;
  if (!state.runs.length) {
    board.clear();
    lastKey = '';
    page.board.append(
      element(
        'section',
        { class: 'block note empty' },
        element('h3', {}, 'No training diagnostics yet'),
        element('p', {}, 'They appear with the first sample of a run that trains with the callback, or with the engine and a log_dir.'),
      ),
    );
    return;
  }
  const asked = query();
  const stamps = state.runs.filter((r) => asked.run.includes(r.name)).map((r) => r.stamp);
  const key = JSON.stringify([asked, stamps, state.charts]);
  if (key === lastKey && !always) {
    page.root.dataset.drawn = `${shown.panel} ${asked.theme}`;
    return;
  }
  asking?.abort();
  asking = new AbortController();
  const mine = asking;
  page.board.setAttribute('aria-busy', 'true');
  try {
    const content = await panel(asked, mine.signal);
    if (mine.signal.aborted) return;
    lastKey = key;
    failure = null;
    if (asked.run.length > shown.runs.size) {
      const text = `Tick two runs or more to compare those; now ${asked.run.length} are compared.`;
      content.blocks.unshift({ kind: 'note', id: 'all', text });
    }
    await board.draw(content);
    if (mine.signal.aborted) return;
    page.root.dataset.drawn = `${shown.panel} ${asked.theme}`;
    status();
  } catch (error) {
    if (error.name !== 'AbortError') tell(error);
  } finally {
    if (asking === mine) page.board.removeAttribute('aria-busy');
  }
}

// The table of alerts counts what is filtered out, so its panel comes whole, and the marks over the loss once more.
async function panel({ severity, ...asked }, signal) {
  if (!severity || asked.panel !== 'overview') return readPanel(asked, signal);
  const [whole, part] = await Promise.all([
    readPanel(asked, signal),
    readPanel({ ...asked, severity, block: 'timeline' }, signal),
  ]);
  const same = (a, b) => a.kind === 'figure' && a.run === b.run && a.id === b.id;
  whole.blocks = whole.blocks.map((block) => part.blocks.find((b) => same(b, block)) || block);
  return whole;
}

function tell(error) {
  failure = error.message || String(error);
  status();
}

// --- the frame around the panels ---------------------------------------------------------------------------------------

function frame() {
  const tabs = element('div', { class: 'tabs', role: 'tablist', 'aria-label': 'Panels' });
  arrows(tabs, '[role="tab"]');
  const status = element('div', { class: 'status' });
  const filter = element('input', {
    type: 'search',
    placeholder: 'Filter runs',
    'aria-label': 'Filter runs',
    oninput: () => drawRuns(),
  });
  const runs = element('ul', { class: 'run-list' });
  const problems = element('div', { class: 'problems' });
  const board = element('div', { class: 'board', id: 'board', role: 'tabpanel', tabindex: '-1' });
  const side = element('nav', { class: 'side', 'aria-label': 'Runs' }, element('h2', {}, 'Runs'), filter, runs);
  const main = element('main', { class: 'main' }, problems, board);
  const root = element('div', { class: 'app' }, side, element('div', { class: 'body' }, element('header', {}, tabs, status), main));
  return { root, tabs, status, filter, runs, problems, board, main, side };
}

function drawTabs() {
  const focused = page.tabs.contains(document.activeElement);
  page.tabs.replaceChildren(
    ...state.panels.map((panel) => {
      const chosen = panel.id === shown.panel;
      return element(
        'button',
        {
          type: 'button',
          role: 'tab',
          id: `tab-${panel.id}`,
          'aria-selected': String(chosen),
          'aria-controls': 'board',
          tabindex: chosen ? '0' : '-1',
          onclick: () => {
            if (shown.panel === panel.id) return;
            shown.panel = panel.id;
            remember();
            drawTabs();
            page.main.scrollTop = 0;
            show();
          },
        },
        panel.title,
      );
    }),
  );
  page.board.setAttribute('aria-labelledby', `tab-${shown.panel}`);
  if (focused) page.tabs.querySelector('[aria-selected="true"]')?.focus();
}

function drawRuns() {
  if (!state) return;
  const wanted = page.filter.value.toLowerCase();
  const at = [...page.runs.querySelectorAll('input, button')].indexOf(document.activeElement);
  page.filter.hidden = state.runs.length < 6;
  page.runs.replaceChildren(
    ...state.runs
      .filter((run) => run.name.toLowerCase().includes(wanted))
      .map((run) => {
        const level = run.read ? run.severity || 'quiet' : 'unseen';
        const words = { critical: 'critical alerts', warning: 'warnings', info: 'notes', quiet: 'no alerts', unseen: 'not read yet' }[level];
        const box = element('input', {
          type: 'checkbox',
          'aria-label': `Show ${run.name}`,
          onchange: () => {
            shown.runs.has(run.name) ? shown.runs.delete(run.name) : shown.runs.add(run.name);
            if (!shown.runs.size) shown.runs.add(run.name);
            chosen();
          },
        });
        box.checked = shown.runs.has(run.name);
        const facts = [
          run.step === null ? 'just begun' : `step ${run.step.toLocaleString('en')}`,
          run.length ? `of ${run.length.toLocaleString('en')}` : null,
          run.jobs > 1 ? `${run.jobs} jobs` : null,
        ];
        return element(
          'li',
          { class: shown.runs.has(run.name) ? 'chosen' : null },
          box,
          element(
            'button',
            {
              type: 'button',
              title: `Only ${run.name}`,
              onclick: () => {
                shown.runs = new Set([run.name]);
                chosen();
              },
            },
            element(
              'span',
              { class: 'run-title' },
              element('span', { class: `mark ${level}`, role: 'img', 'aria-label': words, title: words }),
              element('span', { class: 'clip' }, run.name === '.' ? '. (the folder itself)' : run.name),
            ),
            element('span', { class: 'faint' }, facts.filter(Boolean).join(' ')),
          ),
        );
      }),
  );
  if (at >= 0) page.runs.querySelectorAll('input, button')[at]?.focus();
}

function chosen() {
  remember();
  drawRuns();
  drawProblems();
  show();
}

function drawProblems() {
  const texts = state.charts ? [state.charts] : [];
  let unread = 0;
  for (const run of state.runs.filter((r) => shown.runs.has(r.name))) {
    if (run.sampled) {
      texts.push(`${run.name} is read through TensorBoard, which keeps a sample of a long run: --samples_per_plugin traindiag=0 keeps all.`);
    }
    texts.push(...run.problems);
    unread += run.problems.length;
  }
  if (!state.runs.length || !unread) {
    texts.push(...state.problems);
    unread += state.problems.length;
  }
  page.problems.replaceChildren();
  if (!texts.length) return;
  page.problems.append(
    element(
      'details',
      { class: 'problem', open: !state.runs.length || Boolean(state.charts) },
      element('summary', {}, texts.length === 1 ? 'Something cannot be shown' : `${texts.length} things cannot be shown`),
      element('ul', {}, texts.slice(0, 20).map((t) => element('li', {}, t))),
      unread > 0 && element('p', { class: 'faint' }, HELP),
    ),
  );
}

function status() {
  const live = new Date().toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit' });
  page.status.className = failure ? 'status failed' : 'status';
  failure ? page.status.setAttribute('role', 'alert') : page.status.removeAttribute('role');
  page.status.textContent = failure || `as of ${live}`;
}
