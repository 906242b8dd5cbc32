// Blocks of a panel onto the page. A block that was there keeps its place and its chart, so nothing jumps while a run
// goes on.

import { element } from './dom.js';
import { drawTable, targetOf } from './table.js';

const CONFIG = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d'],
  toImageButtonOptions: { format: 'svg', filename: 'traindiag' },
};

export class Board {
  // `host` offers plotly() (a promise), charts() (why there are none, or null), options() (what was chosen), go(target),
  // choose(option, value, block), chosen() and filter(levels).
  constructor(box, host) {
    this.box = box;
    this.host = host;
    this.kept = new Map();
    this.memory = new Map();
  }

  clear() {
    for (const { plot } of this.kept.values()) {
      if (plot && window.Plotly) window.Plotly.purge(plot);
    }
    this.kept.clear();
    this.box.replaceChildren();
  }

  async draw(content) {
    this.content = content;
    const several = new Set(content.blocks.map((b) => b.run).filter(Boolean)).size > 1;
    const seen = new Set();
    const drawing = [];
    let run = null;
    const placed = [];
    const wide = wideOnes(content.blocks);
    content.blocks.forEach((block, at) => {
      if (several && block.run && block.run !== run) {
        run = block.run;
        placed.push(element('h2', { class: 'run-name' }, run));
      }
      const key = JSON.stringify([content.panel, block.run ?? '', block.kind, block.id ?? at]);
      seen.add(key);
      let kept = this.kept.get(key);
      if (!kept) {
        kept = { node: element('section', { class: `block ${block.kind}`, 'data-block': block.id ?? '' }) };
        this.kept.set(key, kept);
      }
      kept.node.classList.toggle('wide', wide.has(at));
      placed.push(kept.node);
      drawing.push(() => this.fill(kept, block, key));
    });
    for (const [key, { plot }] of this.kept) {
      if (seen.has(key)) continue;
      if (plot && window.Plotly) window.Plotly.purge(plot);
      this.kept.delete(key);
    }
    const same = placed.length === this.box.children.length && placed.every((n, i) => n === this.box.children[i]);
    if (!same) this.box.replaceChildren(...placed);
    for (const draw of drawing) {
      await draw();
      await new Promise((next) => setTimeout(next)); // what is drawn is seen before the next is begun
    }
  }

  // One figure anew, such as the next step of a slider.
  async redraw(panel, block) {
    const key = JSON.stringify([panel, block.run ?? '', block.kind, block.id]);
    const kept = this.kept.get(key);
    if (kept) await this.fill(kept, block, key);
  }

  remembered(key) {
    if (!this.memory.has(key)) this.memory.set(key, {});
    return this.memory.get(key);
  }

  async fill(kept, block, key) {
    if (block.kind === 'figure') return this.fillFigure(kept, block);
    const title = block.title ? element('h3', {}, block.title) : null;
    let inside;
    if (block.kind === 'table') inside = drawTable(block, this.remembered(key), this.host);
    else if (block.kind === 'cards') inside = cards(block, this.host.go);
    else inside = element('p', {}, String(block.text ?? ''));
    const focus = kept.node.contains(document.activeElement) ? place(kept.node, document.activeElement) : null;
    kept.node.replaceChildren(...[title, inside].filter(Boolean));
    if (focus !== null) kept.node.querySelectorAll('button')[focus]?.focus();
    return undefined;
  }

  async fillFigure(kept, block) {
    if (!kept.plot) {
      kept.title = element('h3', {});
      kept.note = element('p', { class: 'note-line' });
      kept.controls = element('div', { class: 'controls' });
      kept.plot = element('div', { class: 'plot' });
      kept.node.append(element('div', { class: 'figure-head' }, kept.title, kept.controls), kept.note, kept.plot);
    }
    kept.title.textContent = block.title || '';
    kept.note.textContent = block.note || '';
    this.fillControls(kept, block);
    if (this.host.charts()) {
      kept.plot.replaceChildren(element('p', { class: 'missing' }, 'This chart needs plotly.'));
      return;
    }
    const { data, layout } = block.figure;
    makeRoom(layout, data, kept.plot.clientWidth || 480);
    kept.plot.style.minHeight = `${layout.height || 300}px`;
    kept.plot.setAttribute('role', 'img');
    kept.plot.setAttribute('aria-label', [block.title, block.note].filter(Boolean).join('. '));
    const plotly = await this.host.plotly();
    const fresh = !kept.plot.classList.contains('js-plotly-plot');
    layout.uirevision ??= 'kept'; // what was zoomed stays zoomed when values come in
    markStep(layout, this.host.options().step);
    if (layout.yaxis2) layout.yaxis2.range = [0, 1.04]; // what lies on the edge cannot be clicked
    await plotly.react(kept.plot, data, layout, CONFIG);
    if (fresh) kept.plot.on('plotly_click', (event) => this.clicked(event));
  }

  // A mark of an alert carries the id of its event; the table of this panel says where to look for it.
  clicked(event) {
    const id = event.points?.[0]?.customdata;
    if (typeof id !== 'string') return;
    const rows = this.content.blocks.filter((b) => b.kind === 'table').flatMap((b) => b.rows);
    const row = rows.find((r) => r.id === id && r.link);
    this.host.go(row ? targetOf(row) : { panel: 'overview', event: id });
  }

  fillControls(kept, block) {
    const wanted = block.controls || [];
    const shape = JSON.stringify(wanted.map((c) => [c.option, c.kind]));
    if (kept.shape !== shape) {
      kept.shape = shape;
      kept.inputs = wanted.map((control) => (slides(control) ? slider(this.host, block) : select(this.host, block)));
      kept.controls.replaceChildren(...kept.inputs.map((i) => i.node));
    }
    wanted.forEach((control, at) => kept.inputs[at].update(control, block));
  }
}

// A line at the step that was chosen, in every chart over steps.
function markStep(layout, step) {
  const wanted = Number(step);
  if (step === undefined || step === '' || !Number.isFinite(wanted) || layout.xaxis?.title?.text !== 'step') return;
  const steps = layout.meta?.steps;
  const x = steps ? Math.max(0, steps.findLastIndex((s) => s <= wanted)) : wanted;
  const colour = getComputedStyle(document.documentElement).getPropertyValue('--accent').trim();
  const line = { color: colour, width: 1.5 };
  const shape = { type: 'line', name: 'chosen', x0: x, x1: x, y0: 0, y1: 1, yref: 'paper', layer: 'above', opacity: 0.75, line };
  layout.shapes = [...(layout.shapes || []), shape];
}

const TALL = 440;

// Figures stand in pairs. A tall one has the whole width, and of an odd number in a row the first one.
function wideOnes(blocks) {
  const wide = new Set();
  let row = [];
  const end = () => {
    if (row.length % 2) wide.add(row[0]);
    row = [];
  };
  blocks.forEach((block, at) => {
    const tall = block.kind === 'figure' && (block.figure.layout.height || 0) > TALL;
    if (tall) wide.add(at);
    if (block.kind !== 'figure' || tall || block.run !== blocks[at - 1]?.run) end();
    if (block.kind === 'figure' && !tall) row.push(at);
  });
  end();
  return wide;
}

// A long legend gets room of its own rather than the chart's.
function makeRoom(layout, data, width) {
  const names = data.filter((t) => t.showlegend !== false && t.type === 'scatter').map((t) => t.name || '');
  if (layout.showlegend === false || names.length < 2 || !layout.height) return;
  const longest = Math.max(...names.map((n) => n.length));
  const across = Math.max(1, Math.floor((width - 80) / (longest * 6.2 + 50)));
  layout.height += Math.max(0, Math.ceil(names.length / across) - 1) * 18;
}

function place(node, active) {
  return [...node.querySelectorAll('button')].indexOf(active);
}

function slides(control) {
  return control.kind === 'slider';
}

function slider(host) {
  const text = element('output', { class: 'at' });
  const input = element('input', { type: 'range', min: 0, step: 1 });
  const name = element('span', {});
  let control = null;
  let block = null;
  let moving = false;
  input.addEventListener('input', () => {
    moving = true;
    label();
    host.choose(control.option, control.values[input.value], block);
  });
  input.addEventListener('change', () => {
    moving = false;
    host.chosen();
  });
  function label() {
    const value = control.values[input.value];
    text.textContent = value === undefined ? '' : value.toLocaleString('en');
    input.setAttribute('aria-valuetext', `${control.label || control.option} ${value}`);
  }
  return {
    node: element('label', { class: 'slider' }, name, input, text),
    update(next, of) {
      control = next;
      block = of;
      name.textContent = control.label || control.option;
      input.max = control.values.length - 1;
      input.disabled = control.values.length < 2;
      if (!moving) {
        const at = control.values.indexOf(control.value);
        input.value = at < 0 ? control.values.length - 1 : at;
      }
      label();
    },
  };
}

function select(host) {
  const name = element('span', {});
  const input = element('select', {});
  let control = null;
  let block = null;
  input.addEventListener('change', () => {
    host.choose(control.option, input.value, block);
    host.chosen();
  });
  return {
    node: element('label', { class: 'select' }, name, input),
    update(next, of) {
      control = next;
      block = of;
      name.textContent = control.label || control.option;
      input.replaceChildren(...control.values.map((v) => element('option', { value: String(v) }, String(v))));
      input.value = String(control.value);
    },
  };
}

function cards(block, go) {
  return element(
    'ul',
    { class: 'card-list' },
    block.cards.map((card) => {
      const state = /^[a-z-]+$/.test(card.state || '') ? card.state : 'unseen';
      const inside = [
        element('span', { class: 'card-title' }, element('span', { class: `mark ${state}`, 'aria-hidden': 'true' }), card.title),
        element('span', { class: 'card-value' }, String(card.value ?? '')),
        card.note ? element('span', { class: 'card-note' }, card.note) : null,
      ];
      return element(
        'li',
        { class: `card ${state}` },
        card.panel
          ? element('button', { type: 'button', onclick: () => go({ panel: card.panel }) }, inside)
          : element('div', {}, inside),
      );
    }),
  );
}
