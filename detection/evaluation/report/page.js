'use strict';
// One object of data, one object of choices, and a function for each part of the page that draws it anew when a choice it hangs on changes.
// Text of the data set goes in as text nodes only.

const data = JSON.parse(document.getElementById('data').textContent);
const RIGHT = -1, MISSED = 5, ALL = -1, ANY = -1, PERFECT = -2, PAGE = 24;
const K = data.classes.length, runs = data.runs, two = runs.length === 2, scale = 10 ** data.digits;
const COLORS = ['var(--accent)', 'var(--second)'];
const MEANINGS = {
  classification: 'the place of an object, the name of another class (IoU 0.5 or more with an object of another class)',
  localisation: 'the right class, badly placed (IoU from 0.1 to 0.5 with an object of its class)',
  both: 'the wrong class, and badly placed',
  duplicate: 'an object found once more (a surer detection has it)',
  background: 'nothing is there (IoU below 0.1 with every object)',
  missed: 'an object that nobody found at any score, nor tried to with the wrong class or place',
};
const choice = {cls: ALL, kind: ANY, order: 'worst', threshold: 0.5, shown: PAGE, confusionRun: 0, sort: {key: 'objects', down: true}, open: -1};

// ---- small helpers

const byId = id => document.getElementById(id);
function el(tag, attributes = {}, ...children) {
  const svg = ['svg', 'rect', 'path', 'line', 'text', 'title', 'image', 'g', 'circle'].includes(tag);
  const node = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
}
const number = (value, digits = 3) => value === null || value === undefined || value < 0 ? '–' : value.toFixed(digits);
const signed = (value, digits = 3) => value === null || value === undefined ? '–' : (value < 0 ? '−' : '+') + Math.abs(value).toFixed(digits);
const whole = value => value.toLocaleString('en');
const many = (count, word) => `${whole(count)} ${word}${count === 1 ? '' : word.endsWith('s') ? 'es' : 's'}`;
const sum = values => values.reduce((a, b) => a + b, 0);
function mean(values) {
  const there = values.filter(value => value !== null && value !== undefined && value >= -1);
  return there.length ? sum(there) / there.length : null;
}
const of = (perClass, cls = choice.cls) => cls === ALL ? mean(perClass) : perClass[cls];
const className = cls => cls === ALL ? 'all classes' : data.classes[cls];
const swatch = run => el('i', {style: `background:${COLORS[run]}`});
const between = interval => interval[1] === null ? '–' : `${signed(interval[1])} … ${signed(interval[2])}`;
const span = interval => interval ? `${number(interval[1])} … ${number(interval[2])}` : '';
const tone = interval => interval[1] > 0 ? 'gain' : interval[2] < 0 ? 'loss' : 'quiet';

// ---- head, cards and figures

function drawHead() {
  byId('runs').replaceChildren(...runs.map((run, i) => el('span', {class: 'run'}, two ? swatch(i) : null, run.name)));
  const objects = sum(data.objects[data.objects.length - 1]);
  const crowds = data.crowds ? ` (and ${whole(data.crowds)} crowd or difficult, which do not count)` : '';
  byId('about').textContent = `${many(data.imageCount, 'image')}, ${many(K, 'class')}, ${many(objects, 'object')}${crowds}; ` +
    runs.map(run => many(run.detections, 'detection')).join(' and ');
  byId('class').replaceChildren(el('option', {value: ALL}, 'all classes'), ...data.classes.map((name, i) => el('option', {value: i}, name)));
  byId('class').addEventListener('change', event => choose({cls: Number(event.target.value)}));
}

const CARDS = [['mAP', 'VOC mAP', `area, IoU ${runs[0].iou}`], ['AP', 'AP', 'IoU 0.50 to 0.95'], ['AP50', 'AP50', 'IoU 0.5'], ['AP75', 'AP75', 'IoU 0.75'],
  ['segm/AP', 'Mask AP', 'IoU 0.50 to 0.95'], ['AR100', 'AR100', 'best 100 an image']];
const LONG = {AP: 'AP, IoU 0.50 to 0.95', AP50: 'AP, IoU 0.50', AP75: 'AP, IoU 0.75', APs: 'AP, small objects (below 32² px)', APm: 'AP, medium objects',
  APl: 'AP, large objects (above 96² px)', AR1: 'AR, best 1 an image', AR10: 'AR, best 10', AR100: 'AR, best 100', ARs: 'AR, small objects', ARm: 'AR, medium objects',
  ARl: 'AR, large objects', mAP: `VOC mAP, area, IoU ${runs[0].iou}`, mAP_11_point: `VOC mAP, 11 points, IoU ${runs[0].iou}`};

function drawSummary() {
  const cards = CARDS.filter(([key]) => key in runs[0].figures).map(([key, title, note]) => {
    const [one, other] = runs.map(run => run.figures[key]);
    const interval = two && data.comparison.overall[key];
    return el('div', {class: 'card'}, title, el('b', {'data-figure': key}, number(one)), el('span', {class: 'quiet'}, note),
      !two && runs[0].intervals[key] ? el('span', {class: 'against', 'data-interval': key}, `95 %: ${span(runs[0].intervals[key])}`) : null,
      two && other !== undefined ? el('span', {class: 'against'}, `${number(other)} `, el('span', {class: interval ? tone(interval) : 'quiet'}, signed(other - one))) : null);
  });
  const sure = runs[0], right = sum(sure.right), claimed = sum(sure.sure), objects = sum(data.objects[data.objects.length - 1]);
  cards.push(el('div', {class: 'card'}, 'Working point', el('b', {}, number(sure.threshold, data.digits)), el('span', {class: 'quiet'},
    `score of the best F1: precision ${number(claimed ? right / claimed : null, 2)}, recall ${number(objects ? right / objects : null, 2)}`)));
  byId('cards').replaceChildren(...cards);
  const rows = Object.keys(runs[0].figures).map(key => el('tr', {}, el('th', {scope: 'row'}, LONG[key.replace('segm/', '')] ? (key.startsWith('segm/') ? 'masks: ' : '') + LONG[key.replace('segm/', '')] : key),
    ...runs.map(run => el('td', {'data-figure-exact': run.figures[key]}, number(run.figures[key], 4))), ...(two ? differenceCells(key) : [el('td', {}, span(runs[0].intervals[key]))])));
  const heads = ['Figure', ...runs.map(run => run.name), ...(two ? ['Difference', '95 % interval'] : ['95 % interval'])];
  const table = el('table', {}, el('thead', {}, el('tr', {}, heads.map(text => el('th', {scope: 'col'}, text)))), el('tbody', {}, rows));
  byId('figures').replaceChildren(el('details', {open: two}, el('summary', {}, 'All figures'), table,
    el('p', {class: 'quiet'}, !data.resamples ? 'There are no intervals: these need objects in two images or more.' : two ? `Difference: second less first. The interval is of a paired bootstrap over images (${data.resamples} draws); where it does not hold 0, ` +
      'other images of this kind would hardly turn the order round. It says nothing about another seed of training.' :
      `The interval is of a bootstrap over images (${data.resamples} draws): between these lies what as many other images of this kind would give. It says nothing about another seed of training.`)));
}

function differenceCells(key) {
  const [one, other] = runs.map(run => run.figures[key]), interval = data.comparison.overall[key];
  const gap = one === undefined || other === undefined || one < 0 || other < 0 ? null : other - one;
  return [el('td', {class: interval ? tone(interval) : null}, signed(gap, 4)), el('td', {}, interval ? between(interval) : '')];
}

// ---- errors

function drawErrors() {
  const costs = runs.map(run => data.kinds.map((_, kind) => of(run.cost[kind]))), most = Math.max(0.001, ...costs.flat().map(value => value || 0));
  byId('kinds').replaceChildren(...data.kinds.map((name, kind) => {
    const counts = runs.map(run => choice.cls === ALL ? sum(run.count[kind]) : run.count[kind][choice.cls]);
    const label = `${name}: ` + runs.map((run, i) => `${two ? run.name + ' ' : ''}costs ${signed(costs[i][kind])} AP50, ${counts[i]} errors`).join('; ');
    return el('button', {type: 'button', class: 'kind', 'data-kind': kind, 'aria-pressed': String(choice.kind === kind), 'aria-label': label,
      onclick: () => { choose({kind: choice.kind === kind ? ANY : kind}); }},
      el('span', {}, el('i', {class: 'dot', style: `background:var(--${name})`}), name),
      el('span', {class: 'bars'}, runs.map((_, i) => el('i', {class: i ? 'b' : 'a', style: `background:var(--${name});width:${100 * Math.max(0, costs[i][kind] || 0) / most}%`}))),
      el('span', {class: 'n'}, runs.map((_, i) => el('span', {}, signed(costs[i][kind])))), el('span', {class: 'n quiet'}, runs.map((_, i) => el('span', {}, many(counts[i], 'error')))));
  }));
}

// ---- charts

function axes(width, height, left, bottom, ticks, name, side, top = 1) {
  const middle = 10 + (height - bottom - 10) / 2;
  const parts = [el('text', {x: 12, y: middle, 'text-anchor': 'middle', transform: `rotate(-90 12 ${middle})`}, side)];
  for (let i = 0; i <= 5; i++) {
    const y = 10 + (height - bottom - 10) * (1 - i / 5);
    parts.push(el('line', {class: i ? 'grid' : 'axis', x1: left, x2: width - 10, y1: y, y2: y}), el('text', {x: left - 7, y: y + 4, 'text-anchor': 'end'}, (top * i / 5).toFixed(top < 0.5 ? 2 : 1)));
  }
  ticks.forEach(([x, text]) => parts.push(el('text', {x, y: height - bottom + 17, 'text-anchor': 'middle'}, text)));
  parts.push(el('text', {x: (left + width) / 2, y: height - 3, 'text-anchor': 'middle'}, name));
  return parts;
}

const LINES = [['AP50', 'IoU 0.5', 2.4, 1], ['AP75', 'IoU 0.75', 1.8, 0.75], ['AP', 'mean, 0.5 to 0.95', 1.4, 0.5]];
function drawCurves() {
  const width = 520, height = 320, left = 52, bottom = 40;
  const x = recall => left + (width - 10 - left) * recall, y = value => 10 + (height - bottom - 10) * (1 - value);
  const parts = axes(width, height, left, bottom, [0, 0.2, 0.4, 0.6, 0.8, 1].map(value => [x(value), value.toFixed(1)]), 'recall', 'precision'), keys = [];
  runs.forEach((run, i) => LINES.forEach(([name, text, thick, opacity], line) => {
    const curves = choice.cls === ALL ? run.curves[line].filter(curve => curve[0] !== null) : [run.curves[line][choice.cls]].filter(curve => curve[0] !== null);
    if (!curves.length) return;
    const points = curves[0].map((_, r) => sum(curves.map(curve => curve[r])) / curves.length);
    const style = {stroke: COLORS[i], 'stroke-width': thick, 'stroke-opacity': opacity, 'stroke-dasharray': line ? (line === 1 ? '7 4' : '2 3') : null, fill: 'none'};
    parts.push(el('path', {d: 'M' + points.map((value, r) => `${x(r / 100).toFixed(1)} ${y(value).toFixed(1)}`).join('L'), ...style}, el('title', {}, `${run.name}, ${text}`)));
    keys.push(el('span', {}, el('svg', {viewBox: '0 0 32 10', 'aria-hidden': 'true'}, el('line', {x1: 0, x2: 32, y1: 5, y2: 5, ...style})), `${two ? run.name + ', ' : ''}${text}: ${number(sum(points) / 101)}`));
  }));
  const label = `Precision against recall of ${className(choice.cls)}. ` + keys.map(key => key.textContent).join('; ');
  byId('pr').replaceChildren(keys.length ? el('svg', {class: 'chart', viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label}, parts) : el('p', {}, 'No object of this class.'),
    el('div', {class: 'keys'}, keys));
}

function drawSizes() {
  const width = 520, height = 320, left = 52, bottom = 40, borders = data.sizeBorders, step = (width - 10 - left) / borders.length;
  const names = borders.map((low, i) => i + 1 < borders.length ? `${low} to ${borders[i + 1]}` : `over ${low}`);
  const counts = borders.map((_, size) => choice.cls === ALL ? sum(data.objects[size]) : data.objects[size][choice.cls]);
  const values = borders.map((_, size) => runs.map(run => of(run.sizes[size]))), most = Math.max(...values.flat().map(value => value || 0));
  const top = [0.1, 0.25, 0.5, 1].find(one => most <= one * 0.96) || 1, said = [];
  const parts = axes(width, height, left, bottom, borders.map((low, i) => [left + step * i, String(low)]), 'side in pixels (root of the area); over each bar how many objects', 'AP50', top);
  counts.forEach((count, size) => {
    const bar = step * 0.78 / runs.length;
    let highest = height - bottom;
    values[size].forEach((value, i) => {
      if (value === null || value === undefined) return;
      const tall = (height - bottom - 10) * value / top, y = height - bottom - tall;
      highest = Math.min(highest, y);
      parts.push(el('rect', {x: left + step * (size + 0.11) + bar * i, y, width: bar - 1, height: Math.max(tall, 1), rx: 2, fill: COLORS[i]}, el('title', {}, `${names[size]} px: AP50 ${number(value)}, ${many(count, 'object')}`)));
    });
    parts.push(el('text', {x: left + step * (size + 0.5), y: Math.max(highest - 5, 9), 'text-anchor': 'middle'}, count ? whole(count) : ''));
    if (count) said.push(`${names[size]} pixels: ${values[size].map(value => number(value)).join(' and ')}`);
  });
  byId('sizes').replaceChildren(el('svg', {class: 'chart', viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `AP50 by object size of ${className(choice.cls)}. ${said.join('; ')}`}, parts),
    two ? el('div', {class: 'keys'}, runs.map((run, i) => el('span', {class: 'run'}, swatch(i), run.name))) : el('span'));
}

// ---- the table of classes

function classColumns() {
  const plain = value => number(value);
  const main = runs[0], columns = [['name', 'Class', cls => data.classes[cls], null], ['objects', 'Objects', cls => data.objects[data.objects.length - 1][cls], value => whole(value)]];
  runs.forEach((run, i) => {
    const mark = two ? ` (${i + 1})` : '';
    if (run.perClass.VOC[0] !== null && run.perClass.VOC[0] !== undefined) columns.push([`voc${i}`, `VOC AP${mark}`, cls => run.perClass.VOC[cls], plain]);
    columns.push([`ap${i}`, `AP${mark}`, cls => run.perClass.AP[cls], plain], [`ap50${i}`, `AP50${mark}`, cls => run.ap50[cls], plain]);
    if (run.perClass['segm/AP'][0] !== null && run.perClass['segm/AP'][0] !== undefined) columns.push([`segm${i}`, `Mask AP${mark}`, cls => run.perClass['segm/AP'][cls], plain]);
  });
  if (two) columns.push(['gap', 'AP50 (2) − (1)', cls => data.comparison.classes[cls] && data.comparison.classes[cls][0], value => signed(value)]);
  if (two) columns.push(['interval', '95 % interval', cls => data.comparison.classes[cls] && data.comparison.classes[cls][1], (_, cls) => data.comparison.classes[cls] ? between(data.comparison.classes[cls]) : '–']);
  columns.push(['precision', 'Precision', cls => main.sure[cls] ? main.right[cls] / main.sure[cls] : null, value => number(value, 2)],
    ['recall', 'Recall', cls => data.objects[data.objects.length - 1][cls] ? main.right[cls] / data.objects[data.objects.length - 1][cls] : null, value => number(value, 2)],
    ['worst', 'Costliest error', cls => worstKind(cls)[1], (_, cls) => worstKind(cls)[1] > 0 ? `${data.kinds[worstKind(cls)[0]]} ${signed(worstKind(cls)[1])}` : '–']);
  return columns;
}

function worstKind(cls) {
  const costs = data.kinds.map((_, kind) => runs[0].cost[kind][cls] || 0), most = Math.max(...costs);
  return [costs.indexOf(most), most];
}

function drawClasses() {
  const columns = classColumns(), {key, down} = choice.sort, by = (columns.find(column => column[0] === key) || columns[1])[2];
  const order = data.classes.map((_, cls) => cls).sort((a, b) => {
    const [one, other] = [by(a), by(b)].map(value => value === null || value === undefined ? -Infinity : value);
    return (down ? -1 : 1) * (typeof one === 'string' ? one.localeCompare(other) : one - other) || a - b;
  });
  const heads = columns.map(([name, title]) => el('th', {scope: 'col', 'aria-sort': name === key ? (down ? 'descending' : 'ascending') : 'none'},
    el('button', {type: 'button', 'data-sort': name, onclick: () => { choose({sort: {key: name, down: name === key ? !down : name !== 'name'}}); byId('class-table').querySelector(`[data-sort="${name}"]`).focus(); }},
      title + (name === key ? (down ? ' ↓' : ' ↑') : ''))));
  const rows = order.map(cls => el('tr', {class: cls === choice.cls ? 'chosen' : null}, columns.map(([name, , value, show]) => name === 'name'
    ? el('th', {scope: 'row'}, el('button', {type: 'button', 'aria-pressed': String(cls === choice.cls), onclick: () => choose({cls: cls === choice.cls ? ALL : cls})}, data.classes[cls]))
    : el('td', name === 'gap' && data.comparison.classes[cls] ? {class: tone(data.comparison.classes[cls])} : {}, show(value(cls), cls)))));
  byId('classes-note').textContent = `Precision and recall${two ? ' of the first run' : ''} at its working point, score ${number(runs[0].threshold, data.digits)}. Press a class to see it alone everywhere on this page.` +
    (two ? ` A class whose objects lie in fewer than ${data.leastImages} images has no interval.` : '');
  byId('class-table').replaceChildren(el('table', {}, el('thead', {}, el('tr', {}, heads)), el('tbody', {}, rows)));
}

// ---- confusion

const MOST_CLASSES = 60;
function drawConfusion() {
  const run = runs[choice.confusionRun], cells = run.confusion, label = cls => cls === K ? 'nothing' : data.classes[cls];
  byId('confusion-note').textContent = `Detections scored ${number(run.threshold, data.digits)} or more, IoU 0.5. A row is what was there, a column what it was called; the last row is claims where nothing was, the last column what was not found at that score.`;
  byId('confusion-run').replaceChildren(two ? el('p', {}, runs.map((one, i) => el('button', {type: 'button', 'aria-pressed': String(i === choice.confusionRun), onclick: () => choose({confusionRun: i})}, one.name))) : '');
  const counts = new Map(cells.map(([there, called, times]) => [there * (K + 1) + called, times]));
  const totals = new Array(K + 1).fill(0);
  cells.forEach(([there, , times]) => { totals[there] += times; });
  const shown = data.classes.map((_, cls) => cls).filter(cls => data.objects[data.objects.length - 1][cls] || cells.some(cell => cell[1] === cls));
  shown.sort((a, b) => totals[b] - totals[a]);
  const left = shown.splice(MOST_CLASSES).length, order = shown.sort((a, b) => a - b);
  order.push(K);
  const head = el('tr', {}, el('td'), order.map(cls => el('th', {scope: 'col', title: label(cls)}, el('span', {}, cls === K ? 'not found' : label(cls)))));
  const rows = order.map(there => el('tr', {}, el('th', {scope: 'row', title: label(there)}, label(there)), order.map(called => {
    const times = counts.get(there * (K + 1) + called) || 0, share = totals[there] ? times / totals[there] : 0;
    return el('td', times ? {class: share > 0.55 ? 'strong' : null, style: `background:rgba(var(--heat),${(0.06 + 0.94 * share).toFixed(3)})`, title: `${label(there)}, called ${called === K ? 'nothing (not found)' : label(called)}: ${times} times, ${(100 * share).toFixed(0)} % of the row`} : {}, times ? whole(times) : '');
  })));
  byId('matrix').replaceChildren(el('table', {}, el('caption', {class: 'quiet'}, left ? `The ${MOST_CLASSES} most frequent classes; ${left} more are in the list only` : ''), el('thead', {}, head), el('tbody', {}, rows)));
  const top = cells.filter(([there, called]) => there !== called && there !== K && called !== K).sort((a, b) => b[2] - a[2]).slice(0, 15);
  byId('top-confusions').replaceChildren(...(top.length ? top.map(([there, called, times]) => el('li', {}, el('button', {type: 'button', onclick: () => { choose({cls: called, kind: ANY}); byId('images').scrollIntoView(); }},
    `${label(there)}, called ${label(called)}: ${times}×`))) : [el('li', {}, 'none')]));
}

// ---- images

function judge(image, run) {
  // What of one run in one image stands at the chosen score, and what the filters ask for.
  const found = image.runs[run].found.filter(box => box[5] >= choice.threshold), taken = new Set(found.filter(box => box[6] === RIGHT).map(box => box[7]));
  // Without a right box at this score: not found. Missed is what the errors above count: at no score did anything take it or stand for it.
  const unfound = image.objects.map((_, i) => i).filter(i => !image.objects[i][5] && !taken.has(i)), cut = image.runs[run].cut.filter(([score]) => score >= choice.threshold);
  const right = found.filter(box => box[6] === RIGHT).length, wrong = found.length - right + sum(cut.map(([, times]) => times)), total = right + wrong + unfound.length;
  const isOf = box => choice.cls === ALL || box[4] === choice.cls || (box[7] >= 0 && image.objects[box[7]][4] === choice.cls);
  const wanted = found.filter(box => isOf(box) && (choice.kind === ANY || (choice.kind === PERFECT ? box[6] === RIGHT : box[6] === choice.kind)));
  const missed = image.runs[run].missed, asked = choice.kind === ANY ? unfound : choice.kind === MISSED ? missed : [];
  const lost = asked.filter(i => choice.cls === ALL || image.objects[i][4] === choice.cls);
  return {found, unfound, missed, right, wrong, quality: total ? right / total : 1, wanted, lost};
}

function chosenImages() {
  const all = data.images.map((image, index) => ({image, index, verdicts: runs.map((_, run) => judge(image, run))}));
  const kept = all.filter(({image, verdicts}) => {
    if (choice.kind === PERFECT) return verdicts.every(one => !one.wrong && !one.unfound.length) && (choice.cls === ALL || image.objects.some(object => object[4] === choice.cls));
    if (choice.kind === ANY) return choice.cls === ALL || verdicts.some(one => one.wanted.length || one.lost.length) || image.objects.some(object => object[4] === choice.cls);
    return verdicts.some(one => one.wanted.length || one.lost.length);
  });
  const bad = one => one.wrong + one.unfound.length, surest = one => Math.max(0, ...one.wanted.filter(box => box[6] !== RIGHT).map(box => box[5]));
  const orders = {
    worst: (a, b) => a[0].quality - b[0].quality || bad(b[0]) - bad(a[0]),
    best: (a, b) => b[0].quality - a[0].quality || b[0].right - a[0].right,
    surest: (a, b) => surest(b[0]) - surest(a[0]),
    gain: (a, b) => (b[1].quality - b[0].quality) - (a[1].quality - a[0].quality),
    loss: (a, b) => (a[1].quality - a[0].quality) - (b[1].quality - b[0].quality),
  };
  return kept.sort((a, b) => orders[choice.order](a.verdicts, b.verdicts) || a.index - b.index);
}

function boxNodes([x, y, width, height], kind, dim, text, font) {
  const at = {x, y, width: Math.max(width, 0), height: Math.max(height, 0)}, group = el('g', {class: dim ? 'dim' : null}, el('rect', {class: 'under', ...at}), el('rect', {class: `box ${kind}`, ...at}));
  if (text && byId('draw-names').checked) group.append(el('text', {x: Math.max(x, 0) + font * 0.25, y: Math.max(y + font, font), 'font-size': font, 'stroke-width': font / 5, style: `font-size:${font}px`}, text));
  return group;
}

function picture(image, verdict, name, [shownWidth, shownHeight, letters]) {
  const [width, height] = image.size, font = letters * Math.max(width / shownWidth, height / shownHeight), filtered = choice.kind !== ANY || choice.cls !== ALL;
  const parts = [el('rect', {class: 'blank', width, height})];
  if (image.source) parts.push(el('image', {href: image.source, width, height, preserveAspectRatio: 'none'}));
  else parts.push(el('text', {class: 'blank-note', x: width / 2, y: height / 2, 'text-anchor': 'middle', style: `font-size:${font * 0.9}px`}, image.note.length > 44 ? 'no picture' : image.note, el('title', {}, image.note)));
  const sought = new Set(verdict.wanted.map(box => box[7]));
  if (byId('draw-truth').checked) image.objects.forEach((object, i) => {
    const lost = verdict.unfound.includes(i), dim = filtered && !verdict.lost.includes(i) && !sought.has(i);
    parts.push(boxNodes(object, object[5] ? 'crowd' : lost ? 'unfound' : 'truth', dim, lost ? data.classes[object[4]] : '', font));
  });
  [...verdict.found].reverse().forEach(box => {
    if (!byId(box[6] === RIGHT ? 'draw-right' : 'draw-wrong').checked) return;
    parts.push(boxNodes(box, box[6] === RIGHT ? 'right' : data.kinds[box[6]], filtered && !verdict.wanted.includes(box), `${data.classes[box[4]]} ${box[5].toFixed(2).slice(box[5] < 1 ? 1 : 0)}`, font));
  });
  return el('svg', {class: 'picture', viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `${name}: ${counted(verdict)}`}, parts);
}

const counted = verdict => `${verdict.right} right, ${verdict.wrong} wrong, ${verdict.unfound.length} not found`;
let listed = [];

function drawImages() {
  listed = chosenImages();
  const shown = listed.slice(0, choice.shown), filter = [choice.kind === ANY ? '' : choice.kind === PERFECT ? 'nothing wrong' : data.kinds[choice.kind], choice.cls === ALL ? '' : className(choice.cls)].filter(Boolean).join(', ');
  const part = data.images.length < data.imageCount ? ` on this page (${whole(data.imageCount)} were judged)` : '';
  byId('image-count').textContent = `${whole(listed.length)} of the ${many(data.images.length, 'image')}${part}${filter ? `, with: ${filter}` : ''}`;
  byId('grid').classList.toggle('two', two);
  byId('grid').replaceChildren(...shown.map(({image, verdicts}, place) => el('figure', {},
    el('button', {type: 'button', 'aria-label': `Enlarge ${image.name}`, onclick: () => openViewer(place)}, verdicts.map((verdict, i) => picture(image, verdict, two ? `${image.name}, ${runs[i].name}` : image.name, [270, 203, 11]))),
    el('figcaption', {title: image.name}, image.name.split('/').pop(), verdicts.map((verdict, i) => el('span', {}, two ? `${runs[i].name}: ${counted(verdict)}` : counted(verdict)))))));
  byId('more').hidden = listed.length <= choice.shown;
  byId('more').textContent = `Show ${Math.min(PAGE, listed.length - choice.shown)} more`;
  byId('kind-filter').querySelectorAll('button').forEach(button => button.setAttribute('aria-pressed', String(Number(button.dataset.kind) === choice.kind)));
  if (choice.open >= 0) drawViewer();
}

function openViewer(place) { choice.open = place; drawViewer(); byId('viewer').showModal(); }
function drawViewer() {
  if (!listed.length) { byId('viewer').close(); return; }
  choice.open = Math.max(0, Math.min(choice.open, listed.length - 1));
  const {image, verdicts} = listed[choice.open];
  byId('viewer-title').textContent = image.name;
  byId('viewer-back').disabled = choice.open === 0;
  byId('viewer-next').disabled = choice.open === listed.length - 1;
  const row = cells => el('tr', {}, cells.map(cell => el('td', {}, cell)));
  byId('viewer-body').replaceChildren(el('div', {class: 'panels'}, verdicts.map((verdict, i) => el('div', {}, two ? el('h3', {}, runs[i].name) : null, picture(image, verdict, image.name, two ? [580, 480, 13] : [900, 520, 14]),
    image.note ? el('p', {class: 'quiet'}, image.note) : null,
    el('table', {}, el('thead', {}, el('tr', {}, ['Detection', 'Score', 'Verdict'].map(text => el('th', {scope: 'col'}, text)))), el('tbody', {},
      verdict.found.map(box => row([data.classes[box[4]], box[5].toFixed(3), box[6] === RIGHT ? 'right' : data.kinds[box[6]] + (box[6] === 0 && box[7] >= 0 ? ` (a ${data.classes[image.objects[box[7]][4]]})` : '')])),
      verdict.unfound.map(place => row([data.classes[image.objects[place][4]], '–', verdict.missed.includes(place) ? 'missed' : 'not found at this score']))))))));
}

function drawControls() {
  const names = [['anything', ANY], ...data.kinds.map((name, kind) => [name, kind]), ['nothing wrong', PERFECT]];
  byId('kind-filter').append(...names.map(([name, kind]) => el('button', {type: 'button', 'data-kind': kind, 'aria-pressed': 'false', onclick: () => choose({kind})}, kind >= 0 ? el('i', {class: 'dot', style: `background:var(--${name})`}) : null, name)));
  const orders = [['worst', two ? 'worst of the first run first' : 'worst first'], ['best', two ? 'best of the first run first' : 'best first'], ['surest', 'surest errors first'], ...(two ? [['gain', 'second run better first'], ['loss', 'second run worse first']] : [])];
  byId('order').append(...orders.map(([value, text]) => el('option', {value}, text)));
  byId('order').addEventListener('change', event => choose({order: event.target.value}));
  Object.assign(byId('threshold'), {min: data.leastScore, step: 1 / scale});
  byId('threshold').addEventListener('input', event => choose({threshold: Number(event.target.value)}));
  ['truth', 'right', 'wrong', 'names'].forEach(name => byId(`draw-${name}`).addEventListener('change', drawImages));
  byId('more').addEventListener('click', () => { choice.shown += PAGE; drawImages(); });
  byId('legend').append(...[['truth', 'object'], ['unfound', 'object not found at this score'], ['crowd', 'crowd or difficult'], ['right', 'right'], ...data.kinds.slice(0, 5).map(name => [name, name])].map(([kind, text]) => {
    const sample = el('span', {}, el('i', {}), text);
    sample.firstChild.style.borderColor = {truth: '#8b93a1', unfound: '#d9c322', crowd: '#8b93a1', right: '#2fd39b', classification: '#ff8fce', localisation: '#ffb52e', both: '#ff6a3d', duplicate: '#5ec8ff', background: '#a3abff'}[kind];
    sample.firstChild.style.borderStyle = ['truth', 'unfound', 'crowd'].includes(kind) ? 'dashed' : 'solid';
    return sample;
  }));
  byId('meanings').append(...data.kinds.flatMap(name => [el('dt', {}, el('i', {class: 'dot', style: `background:var(--${name})`}), name), el('dd', {}, MEANINGS[name])]));
  byId('viewer-close').addEventListener('click', () => byId('viewer').close());
  byId('viewer').addEventListener('close', () => { choice.open = -1; });
  byId('viewer-back').addEventListener('click', () => { choice.open--; drawViewer(); });
  byId('viewer-next').addEventListener('click', () => { choice.open++; drawViewer(); });
  byId('viewer').addEventListener('keydown', event => {
    if (event.key === 'ArrowLeft') { choice.open--; drawViewer(); }
    if (event.key === 'ArrowRight') { choice.open++; drawViewer(); }
  });
}

function setTheme(dark) {
  document.documentElement.classList.toggle('dark', dark);
  byId('theme').setAttribute('aria-pressed', String(dark));
}

// ---- choices

const DRAWN_BY = {cls: [drawErrors, drawCurves, drawSizes, drawClasses, drawImages], kind: [drawErrors, drawImages], order: [drawImages], threshold: [drawImages], sort: [drawClasses], confusionRun: [drawConfusion]};
function choose(changes) {
  const parts = new Set();
  for (const [name, value] of Object.entries(changes)) {
    choice[name] = value;
    DRAWN_BY[name].forEach(part => parts.add(part));
  }
  if (parts.has(drawImages)) choice.shown = PAGE;
  byId('class').value = choice.cls;
  byId('class-note').textContent = choice.cls === ALL ? '' : `AP ${number(runs[0].perClass.AP[choice.cls])}, ${many(data.objects[data.objects.length - 1][choice.cls], 'object')}`;
  byId('threshold').value = choice.threshold;
  byId('threshold-value').textContent = choice.threshold.toFixed(data.digits);
  parts.forEach(draw => draw());
}

const wantsDark = matchMedia('(prefers-color-scheme: dark)');
setTheme(wantsDark.matches);
wantsDark.addEventListener('change', event => setTheme(event.matches));
byId('theme').addEventListener('click', () => setTheme(!document.documentElement.classList.contains('dark')));
drawHead();
drawSummary();
drawControls();
drawConfusion();
choose({cls: ALL, kind: ANY, threshold: Math.min(0.95, Math.max(data.leastScore, Math.floor(runs[0].threshold * scale) / scale))});
document.documentElement.dataset.ready = 'true';
