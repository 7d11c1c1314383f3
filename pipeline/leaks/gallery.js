// The page in which a person decides about findings. findings.js calls gallery.open, a file of thumbnails gallery.thumbnails.
"use strict";

const gallery = (() => {
  const ON_PAGE = 24; // images
  const MATCHES = 2; // of an image, shown at first
  const FILES = 64; // of thumbnails, kept in memory
  const HEIGHT = 200, GAP = 8; // units of a drawing

  const by = (id) => document.getElementById(id);
  const form = () => by("filters").elements;
  const number = new Intl.NumberFormat("en").format;

  let groups = []; // {image, findings}: an image with all of its matches
  let images = [];
  let then = ""; // what to do with the file
  let lines = new Map(); // id -> {action, reason}, as data/overrides.csv has them
  let log = []; // [id, action, reason], in the order of the decisions; the last word on an image counts
  let decided = new Map(); // id -> {action, reason}, what the log comes to
  let key = ""; // of the log in localStorage
  let passes = () => true; // what the filters ask of a group and a finding
  let shown = []; // groups that pass the filters, in their order
  let cards = new Map(); // group -> element, of this page
  let current = 0; // the place in `shown`
  let inFile = 1;
  const files = new Map(); // number -> promise of its thumbnails
  const arrived = new Map(); // number -> what the promise waits for

  // Findings, decoded.

  const texts = (column) => column.at.map((at) => (at === null ? null : column.names[at]));

  function open(data) {
    then = data.then;
    const of = data.images, set = texts(of.set), label = texts(of.class);
    inFile = data.inFile;
    images = of.id.map((id, at) => (
      { at, id, set: set[at], class: label[at], decidable: Boolean(of.decidable[at]), extent: of.extent[at] }
    ));
    groups = grouped(data.findings, data.lines);
    lines = new Map(data.overrides.map(([id, action, reason]) => [id, { action, reason }]));
    key = `winnow.gallery.${data.search}`;
    recall();
    offer();
    listen();
    for (const id of ["found", "choose"]) if (by(id)) by(id).open = matchMedia("(min-width: 60rem)").matches;
    refresh();
  }

  function grouped(columns, drawn) {
    const coded = ["relation", "outcome", "strongest", "rule", "fate"];
    const text = Object.fromEntries(coded.map((name) => [name, texts(columns[name])]));
    const found = new Map();
    columns.image.forEach((image, at) => {
      const finding = { lines: drawn[at] || [] };
      for (const name in columns) finding[name] = columns[name][at];
      for (const name of coded) finding[name] = text[name][at];
      finding.match = finding.match === null ? null : images[finding.match];
      if (!found.has(image)) found.set(image, { place: found.size, image: images[image], findings: [] });
      found.get(image).findings.push(finding);
    });
    return [...found.values()];
  }

  // Decisions.

  function recall() {
    try {
      log = JSON.parse(localStorage.getItem(key) || "[]");
    } catch (error) {
      say(`This browser keeps nothing for this page (${error.message}). Download overrides.csv before you close it.`);
    }
    replay();
    const done = new Set([...decided].filter(([id, { action }]) => lines.get(id)?.action === action).map(([id]) => id));
    if (done.size) remember(log.filter(([id]) => !done.has(id)));
  }

  function remember(changed) {
    log = changed;
    replay();
    try {
      localStorage.setItem(key, JSON.stringify(log));
    } catch (error) {
      say(`This browser does not keep the decision (${error.message}). Download overrides.csv before you close the page.`);
    }
  }

  function replay() {
    decided = new Map(log.map(([id, action, reason]) => [id, { action, reason }]));
  }

  function decide(group, action) {
    if (!group?.image.decidable) return;
    const reason = by("reason").value.trim() || "seen by eye";
    remember([...log, [group.image.id, action, reason]]);
    say(`${action}: ${group.image.id} (u undoes it)`);
    const at = current;
    refresh();
    if (shown[at] === group) current = Math.min(at + 1, shown.length - 1); // it passes the filters still
    show(true);
  }

  function undo() {
    if (!log.length) return;
    const id = log[log.length - 1][0];
    remember(log.slice(0, -1));
    say(`undone: ${id}`);
    refresh();
    const at = shown.findIndex((group) => group.image.id === id && group.image.decidable);
    current = at < 0 ? current : at;
    show(true);
  }

  function state(group) {
    if (!group.image.decidable) return "told";
    if (decided.has(group.image.id)) return "decided";
    return lines.has(group.image.id) ? "written" : "open";
  }

  // overrides.csv: the lines that it has, and the decisions.

  const field = (text) => (/[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  function csv() {
    const all = new Map([...lines, ...decided]);
    const rows = [...all].map(([id, { action, reason }]) => [id, action, reason]);
    return [["id", "action", "reason"], ...rows].map((row) => `${row.map(field).join(",")}\n`).join("");
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = "overrides.csv";
    link.click();
    URL.revokeObjectURL(link.href);
    say(`overrides.csv: ${then}`);
  }

  // Filters and order.

  function offer() {
    const findings = groups.flatMap((group) => group.findings);
    for (const name of ["relation", "strongest", "rule"]) options(name, findings.map((finding) => finding[name]));
    options("class", findings.map((finding) => finding.match?.class));
  }

  function options(name, values) {
    const names = [...new Set(values)].filter((value) => value !== null && value !== undefined).sort();
    form()[name].append(...names.map((value) => new Option(name === "relation" ? value.replace("-", " in ") : value, value)));
  }

  // What the form asks of a finding.
  function asked() {
    const { relation, strongest, rule, class: label, least, most, text } = form();
    const [low, high] = [least, most].map((input) => (input.value === "" ? null : Number(input.value)));
    return (group, finding) =>
      (!relation.value || finding.relation === relation.value) &&
      (!strongest.value || finding.strongest === strongest.value) &&
      (!rule.value || finding.rule === rule.value) &&
      (!label.value || finding.match?.class === label.value) &&
      (low === null || (finding.score !== null && finding.score >= low)) &&
      (high === null || (finding.score !== null && finding.score <= high)) &&
      (!text.value || group.image.id.includes(text.value) || Boolean(finding.match?.id.includes(text.value)));
  }

  const best = (group) => Math.max(...group.findings.map((finding) => finding.score ?? -1));
  const ORDERS = {
    doubt: (a, b) => a.place - b.place,
    high: (a, b) => best(b) - best(a) || a.place - b.place,
    low: (a, b) => best(a) - best(b) || a.place - b.place,
    matches: (a, b) => b.findings.length - a.findings.length || a.place - b.place,
    id: (a, b) => (a.image.id < b.image.id ? -1 : 1),
  };

  // After a change of decisions or filters: the list, the counts, the page.
  function refresh() {
    const fitting = groups.filter((group) => group.findings.some((finding) => passes(group, finding)));
    const wanted = form().state.value;
    shown = fitting.filter((group) => !wanted || state(group) === wanted).sort(ORDERS[form().order.value]);
    current = Math.max(0, Math.min(current, shown.length - 1));
    count(fitting);
    show(false);
  }

  function count(fitting) {
    const decidable = fitting.filter((group) => group.image.decidable);
    const left = decidable.filter((group) => state(group) === "open").length;
    by("left").textContent = `${number(left)} of ${number(decidable.length)} images left`;
    by("done").max = decidable.length || 1;
    by("done").value = decidable.length - left;
    by("undo").disabled = by("forget").disabled = !log.length;
    by("download").textContent = `overrides.csv (${number(decided.size)} new)`;
    by("reasons").replaceChildren(...[...new Set(log.map(([, , reason]) => reason))].map((reason) => new Option(reason)));
    const undecided = new Map();
    for (const group of groups) {
      if (state(group) !== "open") continue;
      for (const counted of new Set(group.findings.map(({ relation, strongest }) => `${relation} ${strongest}`))) {
        undecided.set(counted, (undecided.get(counted) || 0) + 1);
      }
    }
    for (const row of document.querySelectorAll("#counts tr[data-relation]")) {
      const { relation, outcome } = row.dataset;
      row.querySelector(".open").textContent = relation.startsWith("val") ? "" : number(undecided.get(`${relation} ${outcome}`) || 0);
    }
  }

  // The page.

  function show(focus) {
    const first = current - (current % ON_PAGE);
    const page = shown.slice(first, first + ON_PAGE);
    cards = new Map(page.map((group) => [group, cards.get(group) || card(group)]));
    const list = by("list");
    const elements = [...cards.values()];
    if (elements.some((element, at) => list.children[at] !== element) || list.children.length !== elements.length) {
      list.replaceChildren(...elements);
    }
    for (const [group, element] of cards) label(group, element);
    for (const element of list.querySelectorAll("[aria-current]")) element.removeAttribute("aria-current");
    const element = cards.get(shown[current]);
    element?.setAttribute("aria-current", "true");
    if (focus && element) reach(element);
    const pages = Math.ceil(shown.length / ON_PAGE);
    by("page").textContent = shown.length
      ? `images ${number(first + 1)} to ${number(first + page.length)} of ${number(shown.length)}`
      : "no image passes these filters";
    by("before").disabled = first === 0;
    by("after").disabled = first / ON_PAGE + 1 >= pages;
  }

  // Focus a card; one that is not whole in the window goes to its top.
  function reach(element) {
    element.focus({ preventScroll: true });
    const { top, bottom } = element.getBoundingClientRect();
    if (top < parseFloat(getComputedStyle(element).scrollMarginTop) || bottom > innerHeight) element.scrollIntoView();
  }

  const copyOf = (template) => by(template).content.firstElementChild.cloneNode(true);

  function card(group) {
    const element = copyOf("card");
    const { id, set, class: label, decidable } = group.image;
    element.querySelector(".name").textContent = id;
    element.querySelector(".set").textContent = label ? `${set}, ${label}` : set;
    element.setAttribute("aria-label", id);
    element.addEventListener("pointerdown", () => point(group));
    for (const action of ["keep", "remove"]) {
      const button = element.querySelector(`.${action}`);
      button.hidden = !decidable;
      button.addEventListener("click", () => {
        point(group);
        decide(group, action);
      });
    }
    const matches = element.querySelector(".matches"), more = element.querySelector(".more");
    const findings = [true, false].flatMap((fits) => group.findings.filter((finding) => passes(group, finding) === fits));
    matches.append(...findings.slice(0, MATCHES).map((finding) => figure(group, finding)));
    more.hidden = findings.length <= MATCHES;
    more.textContent = `${number(findings.length - MATCHES)} more`;
    more.addEventListener("click", () => {
      matches.append(...findings.slice(MATCHES).map((finding) => figure(group, finding)));
      more.hidden = true;
    });
    return element;
  }

  // What was decided about the image, which changes while its card stays.
  function label(group, element) {
    const { id, decidable } = group.image;
    const said = decidable ? decided.get(id) || lines.get(id) : undefined;
    const text = element.querySelector(".decision");
    text.hidden = !said;
    text.className = `decision ${said?.action || ""}`;
    text.textContent = said ? `${said.action}: ${said.reason} (${decided.has(id) ? "decided here" : "in overrides.csv"})` : "";
  }

  function figure(group, finding) {
    const element = copyOf("finding");
    const { match, outcome, rule, fate } = finding;
    const svg = element.querySelector("svg");
    svg.setAttribute("aria-label", match ? `${group.image.id} beside ${match.id}` : group.image.id);
    draw(svg, group.image, finding);
    element.querySelector(".outcome").textContent = outcome;
    element.querySelector(".outcome").classList.add(outcome.replace(" ", "-"));
    element.querySelector(".rule").textContent = rule === outcome ? "" : rule;
    element.querySelector(".match").textContent = match ? `in ${match.id} (${match.class ? `${match.set}, ${match.class}` : match.set})` : "";
    element.querySelector(".measured").textContent = measured(finding);
    element.querySelector(".fate").textContent = fate;
    return element;
  }

  const percent = (share) => `${Math.round(100 * share)} %`;

  function measured(finding) {
    if (finding.score === null) return "";
    const parts = [`score ${finding.score.toFixed(2)}`, `correlation ${finding.zncc.toFixed(2)}`];
    if (finding.inliers !== null) {
      parts.push(`${finding.inliers} features`, `${percent(finding.local)} of the windows agree`);
      parts.push(`covers ${percent(finding.cover_image)} of it and ${percent(finding.cover_match)} of its match`);
    }
    if (finding.mirrored) parts.push("mirrored");
    if (finding.negative) parts.push("negative");
    return parts.join(", ");
  }

  // Drawings: the image on the left, its match on the right, both HEIGHT high.

  function svg(name, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const attribute in attributes) element.setAttribute(attribute, attributes[attribute]);
    return element;
  }

  function draw(canvas, image, finding) {
    const shown = finding.match ? [image, finding.match] : [image];
    const scales = shown.map(({ extent }) => HEIGHT / extent[1]); // from units of the longest side
    const widths = shown.map(({ extent }, at) => extent[0] * scales[at]);
    const left = [0, widths[0] + GAP];
    const width = widths.reduce((a, b) => a + b) + GAP * (shown.length - 1);
    canvas.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    shown.forEach((one, at) => {
      const picture = canvas.appendChild(
        svg("image", { x: left[at], y: 0, width: widths[at], height: HEIGHT, preserveAspectRatio: "none" })
      );
      thumbnail(one).then((uri) => {
        if (uri) picture.setAttribute("href", uri);
        else picture.replaceWith(missing(left[at] + widths[at] / 2));
      });
    });
    const place = (at, [x, y]) => [left[at] + x * scales[at], y * scales[at]];
    for (const [x, y, u, v] of finding.lines) {
      const [[x1, y1], [x2, y2]] = [place(0, [x, y]), place(1, [u, v])];
      canvas.append(svg("line", { class: "line", x1, y1, x2, y2 }));
    }
    if (finding.outline) {
      const frame = canvas.appendChild(svg("svg", { x: left[1], y: 0, width: widths[1], height: HEIGHT })); // cuts off what is outside
      const points = finding.outline.map((corner) => corner.map((value) => value * scales[1])).join(" ");
      frame.append(svg("polygon", { class: "outline", points }));
    }
  }

  function missing(x) {
    const text = svg("text", { class: "missing", x, y: HEIGHT / 2, "text-anchor": "middle" });
    text.textContent = "no picture";
    return text;
  }

  // Thumbnails: files are loaded as they are asked for, and the last FILES are kept.

  function thumbnail(image) {
    const file = Math.floor(image.at / inFile);
    const known = files.get(file) || load(file);
    files.delete(file);
    files.set(file, known);
    if (files.size > FILES) files.delete(files.keys().next().value);
    return known.then((uris) => uris[image.at % inFile]);
  }

  function load(file) {
    return new Promise((resolve) => {
      arrived.set(file, resolve);
      const script = document.createElement("script");
      script.src = `thumbnails/${String(file).padStart(5, "0")}.js`;
      script.onload = () => script.remove();
      script.onerror = () => {
        say(`${script.src} cannot be loaded: the folder of this page is not whole.`);
        resolve([]);
      };
      document.head.append(script);
    });
  }

  function thumbnails(file, uris) {
    arrived.get(file)?.(uris);
    arrived.delete(file);
  }

  // Keys and buttons.

  const KEYS = {
    k: () => decide(shown[current], "keep"),
    r: () => decide(shown[current], "remove"),
    u: undo,
    ArrowLeft: () => move(-1),
    ArrowRight: () => move(1),
    ArrowUp: () => move(-columns()),
    ArrowDown: () => move(columns()),
  };

  function columns() {
    return getComputedStyle(by("list")).gridTemplateColumns.split(" ").length;
  }

  function move(step) {
    current = Math.max(0, Math.min(current + step, shown.length - 1));
    show(true);
  }

  function point(group) {
    current = shown.indexOf(group);
    show(false);
  }

  function turn(pages) {
    current = Math.max(0, current - (current % ON_PAGE) + pages * ON_PAGE);
    show(true);
  }

  function listen() {
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
      const action = KEYS[event.key];
      if (!action) return;
      event.preventDefault();
      action();
    });
    const filtered = () => {
      passes = asked();
      cards.clear(); // the matches that pass come first
      current = 0;
      refresh();
    };
    by("filters").addEventListener("input", filtered);
    by("filters").addEventListener("submit", (event) => event.preventDefault());
    for (const row of document.querySelectorAll("#counts tr[data-relation]")) {
      row.querySelector("button").addEventListener("click", () => {
        form().relation.value = row.dataset.relation;
        form().strongest.value = row.dataset.outcome;
        if (row.dataset.relation.startsWith("val")) form().state.value = "told";
        else if (form().state.value === "told") form().state.value = "open";
        filtered();
      });
    }
    by("undo").addEventListener("click", undo);
    by("download").addEventListener("click", download);
    by("forget").addEventListener("click", () => {
      if (!confirm(`Forget the ${number(decided.size)} decisions of this browser? Lines of data/overrides.csv stay.`)) return;
      remember([]);
      refresh();
    });
    by("before").addEventListener("click", () => turn(-1));
    by("after").addEventListener("click", () => turn(1));
    addEventListener("storage", (event) => {
      if (event.key !== key) return; // another tab decided
      recall();
      refresh();
    });
  }

  function say(text) {
    by("say").textContent = text;
  }

  return { open, thumbnails };
})();
