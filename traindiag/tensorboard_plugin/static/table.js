// Tables: sortable, filtered by severity where they have one, with what is long below the row.

import { breakable, element, number, order } from './dom.js';

const SEVERITIES = ['critical', 'warning', 'info'];
const OPEN = 1; // of the worst, from the start
const NAMES = { critical: 'Critical', warning: 'Warning', info: 'Note', quiet: 'None' };
const LONG = new Set(['list', 'remedies']);
const BELOW = new Set(['cause', 'ruled_out']); // texts of several sentences

// `memory` outlives a redraw: what is sorted and open stays so while the run goes on. `host` offers options() (`event` is
// the row to be shown open, `severity` what is not filtered out), go(target) and filter(levels, block).
export function drawTable(block, memory, host) {
  const chosen = host.options().event ?? null;
  const below = (column) => LONG.has(column.type) || BELOW.has(column.id);
  const brief = block.columns.filter((c) => !below(c));
  const long = block.columns.filter(below);
  const severity = block.columns.find((c) => c.type === 'severity');
  memory.open ||= new Set(worst(block.rows).slice(0, OPEN).map((row) => row.id));
  const levels = new Set((host.options().severity || SEVERITIES.join()).split(','));
  if (chosen !== null && memory.chosen !== chosen) memory.open.add(chosen);
  memory.chosen = chosen;

  const box = element('div', { class: 'table-box' });
  const body = element('tbody');
  const head = element('tr');
  const heads = brief.map((column) => {
    const button = element('button', { type: 'button', class: 'sort', onclick: () => sort(column.id) }, column.title);
    const cell = element('th', { scope: 'col', class: column.type }, button);
    head.append(cell);
    return [column.id, cell];
  });

  function sort(id) {
    memory.descending = memory.by === id ? !memory.descending : false;
    memory.by = id;
    fill();
  }

  function sorted() {
    const rows = block.rows.map((row, at) => [row, at]);
    if (!memory.by) return rows;
    const type = block.columns.find((c) => c.id === memory.by)?.type;
    const key = (row) => (type === 'severity' ? rank(row[memory.by]) : order(row[memory.by], type));
    const sign = memory.descending ? -1 : 1;
    return rows.sort(([a, i], [b, j]) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null) || i - j; // empty ones last, whichever way
      const apart = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y), 'en');
      return sign * apart || i - j;
    });
  }

  function fill() {
    for (const [id, cell] of heads) {
      cell.setAttribute('aria-sort', memory.by !== id ? 'none' : memory.descending ? 'descending' : 'ascending');
    }
    const hidden = (row) => severity && SEVERITIES.includes(row[severity.id]) && !levels.has(row[severity.id]);
    const rows = sorted().filter(([row]) => !hidden(row));
    body.replaceChildren(...rows.flatMap(([row, at]) => lines(row, row.id ?? at)));
    if (!rows.length) {
      const text = block.rows.length ? 'All rows are filtered out.' : 'Nothing here.';
      body.append(element('tr', {}, element('td', { colspan: brief.length, class: 'faint' }, text)));
    }
  }

  function lines(row, key) {
    const told = long.filter((c) => row[c.id] && row[c.id].length);
    const details = told.length
      ? element(
          'tr',
          { class: 'details', hidden: !memory.open.has(key) },
          element('td', { colspan: brief.length }, detail(row, told)),
        )
      : null;
    const line = element('tr', { class: chosen !== null && row.id === chosen ? 'chosen' : null });
    brief.forEach((column, at) => {
      const cell = element('td', { class: column.type });
      if (at === 0 && details) {
        const button = element(
          'button',
          {
            type: 'button',
            class: 'fold',
            'aria-expanded': String(memory.open.has(key)),
            'aria-label': 'Cause and remedies',
            onclick: () => {
              memory.open.has(key) ? memory.open.delete(key) : memory.open.add(key);
              details.hidden = !memory.open.has(key);
              button.setAttribute('aria-expanded', String(!details.hidden));
            },
          },
          '',
        );
        cell.append(button);
      }
      const content = value(row[column.id], column.type);
      if (column.id === 'title' && row.link) {
        const label = `Show ${row[column.id]}`;
        cell.append(
          element('button', { type: 'button', class: 'go', title: label, onclick: () => host.go(targetOf(row)) }, content),
        );
      } else {
        cell.append(content);
      }
      line.append(cell);
    });
    if (severity) line.dataset.severity = row[severity.id] || '';
    return details ? [line, details] : [line];
  }

  if (severity && block.rows.length) {
    const changed = () => {
      fill();
      host.filter(SEVERITIES.filter((s) => levels.has(s)));
    };
    box.append(filter(block, severity, levels, changed));
  }
  box.append(
    element('div', { class: 'scroll' }, element('table', {}, element('thead', {}, head), body)),
  );
  fill();
  return box;
}

function worst(rows) {
  const told = rows.filter((row) => row.severity === 'critical' || row.severity === 'warning');
  return told.sort((a, b) => rank(a.severity) - rank(b.severity));
}

function rank(severity) {
  const at = SEVERITIES.indexOf(severity);
  return at < 0 ? SEVERITIES.length : at;
}

function filter(block, severity, levels, changed) {
  const group = element('div', { class: 'filter', role: 'group', 'aria-label': 'Severity' });
  for (const level of SEVERITIES) {
    const count = block.rows.filter((row) => row[severity.id] === level).length;
    const button = element(
      'button',
      {
        type: 'button',
        class: `chip ${level}`,
        'aria-pressed': String(levels.has(level)),
        onclick: () => {
          levels.has(level) ? levels.delete(level) : levels.add(level);
          button.setAttribute('aria-pressed', String(levels.has(level)));
          changed();
        },
      },
      element('span', { class: `mark ${level}`, 'aria-hidden': 'true' }),
      `${NAMES[level]} ${count}`,
    );
    group.append(button);
  }
  return group;
}

function value(content, type) {
  if (content === null || content === undefined) return element('span', { class: 'faint' }, '');
  if (type === 'severity') {
    return element(
      'span',
      { class: `badge ${SEVERITIES.includes(content) ? content : ''}` },
      element('span', { class: `mark ${SEVERITIES.includes(content) ? content : ''}`, 'aria-hidden': 'true' }),
      NAMES[content] || String(content),
    );
  }
  if (type === 'number' || type === 'step') return number(content);
  return breakable(String(content));
}

// Where to look for what a row tells; what no other panel shows stays in the table itself.
export function targetOf(row) {
  const { panel, options } = row.link;
  return panel === 'overview' ? { panel, event: row.id, ...options } : { panel, ...options };
}

function detail(row, columns) {
  const list = element('dl');
  for (const column of columns) {
    const entries = [row[column.id]].flat();
    list.append(element('dt', {}, column.title));
    list.append(
      element(
        'dd',
        {},
        entries.length === 1 && column.type !== 'remedies'
          ? plain(entries[0])
          : element(column.type === 'remedies' ? 'ol' : 'ul', {}, entries.map((e) => element('li', {}, plain(e)))),
      ),
    );
  }
  return list;
}

function plain(entry) {
  if (entry === null || typeof entry !== 'object') return String(entry);
  const parts = [element('span', {}, String(entry.text ?? ''))];
  if (entry.when) parts.push(element('span', { class: 'when' }, String(entry.when)));
  if (entry.source) parts.push(element('span', { class: 'faint source' }, String(entry.source)));
  return element('span', {}, parts);
}
