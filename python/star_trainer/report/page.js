"use strict";
const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.hidden = !text;
  tip.textContent = text;
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.max(4, y - tip.offsetHeight - 12)}px`;
}

const middle = (element) => {
  const box = element.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
};

// Each point of a chart says its numbers; the one that is nearest to the pointer is read.
for (const chart of document.querySelectorAll(".chart")) {
  const points = [...chart.querySelectorAll('[aria-roledescription="point"]')];
  let place = -1;
  const read = (point) => showTip(point.getAttribute("aria-label"), ...middle(point));
  const nearest = (event) => {
    const distances = points.map((point) => {
      const [x, y] = middle(point);
      return Math.hypot(x - event.clientX, y - event.clientY);
    });
    const least = Math.min(...distances);
    place = least < 40 ? distances.indexOf(least) : -1;
    place < 0 ? showTip("") : read(points[place]);
  };
  chart.addEventListener("pointermove", nearest);
  chart.addEventListener("pointerdown", nearest);
  chart.addEventListener("pointerleave", () => showTip(""));
  chart.addEventListener("blur", () => showTip(""));
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !points.length) return;
    event.preventDefault();
    place = Math.max(0, Math.min(points.length - 1, place + step));
    read(points[place]);
  });
}

const block = document.getElementById("data");
const data = block && JSON.parse(block.textContent);

function colour(weight) {
  const part = weight <= 1 ? (weight - data.low) / (1 - data.low) : 1 + (weight - 1) / (data.high - 1);
  return data.colours[Math.round(Math.max(0, Math.min(2, part)) * 127.5)];
}

function paint(canvas, grid, weights) {
  [canvas.height, canvas.width] = grid;
  const context = canvas.getContext("2d");
  weights.forEach((weight, i) => {
    context.fillStyle = colour(weight);
    context.fillRect(i % grid[1], Math.floor(i / grid[1]), 1, 1);
  });
}

function picture(source, alt) {
  const image = new Image();
  image.onload = () => image.classList.toggle("exact", image.naturalWidth <= 128);
  image.src = source;
  image.alt = alt;
  return image;
}

function setUp(card) {
  const one = data.cases[card.dataset.case];
  const [rows, columns] = one.grid;
  const bytes = Uint8Array.from(atob(one.maps), (letter) => letter.charCodeAt(0));
  const levels = new Uint16Array(bytes.buffer);
  const [stage, value, sheet] = [".stage", ".value", ".sheet"].map((name) => card.querySelector(name));
  const slider = card.querySelector("input");
  const choice = card.querySelector("select");
  const image = picture(one.pictures.at(-1), one.prompt);
  const canvas = document.createElement("canvas");
  const probe = document.createElement("div");
  let at = null;
  probe.className = "probe";
  stage.replaceChildren(image, canvas, probe);

  const unit = () => (choice ? Number(choice.value) : -1);
  const weights = (step) => {
    const first = (unit() * data.titles.length + step) * rows * columns;
    return Array.from(levels.subarray(first, first + rows * columns), (level) => (level / 65535) * data.largest);
  };

  function say() {
    const read = at !== null && unit() >= 0;
    probe.hidden = !read;
    if (!read) {
      if (choice) value.textContent = unit() < 0 ? "" : "point at a place to read its weight";
      return "";
    }
    const [row, column] = [Math.floor(at / columns), at % columns];
    Object.assign(probe.style, {
      left: `${(100 * column) / columns}%`, top: `${(100 * row) / rows}%`,
      width: `${100 / columns}%`, height: `${100 / rows}%`,
    });
    const number = weights(Number(slider.value))[at];
    const said = number < 0.1 ? number.toFixed(2) : number.toPrecision(2);
    value.textContent = `weight ${said} in row ${row + 1}, column ${column + 1}`;
    return value.textContent;
  }

  function show() {
    const step = Number(slider.value);
    const mapped = unit() >= 0;
    const title = data.titles[step];
    card.querySelector("output").textContent = title;
    slider.setAttribute("aria-valuetext", title);
    image.src = one.pictures[step];
    image.alt = `${one.prompt}: ${title}` + (mapped ? `, with the map of ${one.units[unit()]}` : "");
    stage.classList.toggle("mapped", mapped);
    canvas.hidden = !mapped;
    if (mapped) paint(canvas, one.grid, weights(step));
    say();
  }

  // All steps side by side, which is what print shows.
  function layOut() {
    sheet.replaceChildren(...data.titles.map((title, step) => {
      const [figure, holder, caption] = ["figure", "div", "figcaption"].map((name) => document.createElement(name));
      caption.textContent = title;
      holder.append(picture(one.pictures[step], ""));
      if (unit() >= 0) {
        const over = document.createElement("canvas");
        paint(over, one.grid, weights(step));
        holder.className = "mapped";
        holder.append(over);
      }
      figure.append(holder, caption);
      return figure;
    }));
    if (unit() >= 0) {
      const note = document.createElement("p");
      note.textContent = `map of ${one.units[unit()]}`;
      sheet.append(note);
    }
  }

  const point = (event) => {
    const box = stage.getBoundingClientRect();
    const place = (from, length, count) => Math.max(0, Math.min(count - 1, Math.floor((from / length) * count)));
    at = place(event.clientY - box.y, box.height, rows) * columns + place(event.clientX - box.x, box.width, columns);
    showTip(say(), event.clientX, event.clientY);
  };
  const leave = () => { at = null; say(); showTip(""); };
  slider.addEventListener("input", show);
  if (choice) {
    choice.addEventListener("change", () => { show(); layOut(); });
    stage.addEventListener("pointermove", point);
    stage.addEventListener("pointerdown", point);
    stage.addEventListener("pointerleave", leave);
    stage.addEventListener("blur", leave);
    stage.addEventListener("keydown", (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      if (!(event.key in moves)) return;
      const [down, right] = moves[event.key];
      event.preventDefault();
      const [row, column] = at === null ? [0, 0] : [Math.floor(at / columns) + down, (at % columns) + right];
      at = Math.max(0, Math.min(rows - 1, row)) * columns + Math.max(0, Math.min(columns - 1, column));
      say();
    });
  }
  show();
  layOut();
}

document.querySelectorAll(".case").forEach(setUp);
for (const image of document.querySelectorAll(".pairs img")) {
  image.decode().then(() => image.classList.toggle("exact", image.naturalWidth <= 128));
}
