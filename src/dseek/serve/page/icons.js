// Small drawings for buttons, made of paths only.

const PATHS = {
  plus: ["M12 5v14", "M5 12h14"],
  theme: ["M12 3a9 9 0 1 0 0 18z", "M12 3a9 9 0 0 1 0 18"],
  panel: ["M3 5h18v14H3z", "M15 5v14"],
  send: ["M12 19V5", "M6 11l6-6 6 6"],
  stop: ["M7 7h10v10H7z"],
  down: ["M12 5v14", "M6 13l6 6 6-6"],
  copy: ["M9 9h11v11H9z", "M5 15H4V4h11v1"],
  again: ["M20 11a8 8 0 1 0-2.3 6.3", "M20 5v6h-6"],
  edit: ["M4 20h4L19 9l-4-4L4 16z"],
  done: ["M5 13l4 4L19 7"],
};

const SPACE = "http://www.w3.org/2000/svg";

/** Draw an icon. */
export function icon(name) {
  const holder = document.createElement("span");
  holder.className = "icon";
  holder.setAttribute("aria-hidden", "true");
  draw(holder, name);
  return holder;
}

/** Fill every element that names an icon in its data. */
export function fillIcons(root) {
  for (const holder of root.querySelectorAll("[data-icon]")) {
    holder.setAttribute("aria-hidden", "true");
    draw(holder, holder.dataset.icon);
  }
}

function draw(holder, name) {
  const svg = document.createElementNS(SPACE, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  for (const d of PATHS[name]) {
    const path = document.createElementNS(SPACE, "path");
    path.setAttribute("d", d);
    svg.append(path);
  }
  holder.replaceChildren(svg);
}
