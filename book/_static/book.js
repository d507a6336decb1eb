// What the theme leaves undone: equations that fit, marks of a search, solutions that open, pages that print.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const article = () => document.querySelector(".bd-article");

  // Open whatever hides an element.
  const reveal = (element) => {
    for (let at = element; at; at = at.parentElement) {
      if (at.tagName === "DETAILS") at.open = true;
      if (at.matches(".toggle-hidden")) toggleHidden(at.querySelector(".toggle-button"));
    }
  };

  // Equations. One that is wider than its column is broken after wide spaces, or before relations too; its number
  // goes below it; it is made a little smaller; and it scrolls if it still must.
  const smallest = 0.75; // of MathJax's size, which is a fifth above the text's
  const relation = /^(=|:=|\\(le|ge|leq|geq|approx|propto|equiv|Longrightarrow|Rightarrow|implies)(?![a-zA-Z]))/;

  // Cut TeX where a pattern matches outside of braces and blocks; what `keep` says stays with the part behind the cut.
  const cut = (tex, pattern, keep) => {
    const word = /\\(left|begin)(?![a-zA-Z])|\\(right|end)(?![a-zA-Z])|\\[a-zA-Z]+|\\.|[\s\S]/g;
    const parts = [];
    let depth = 0, at = 0;
    for (let match; (match = word.exec(tex)); ) {
      if (match[1] || match[0] === "{") depth++;
      else if (match[2] || match[0] === "}") depth--;
      else if (depth === 0 && pattern.test(tex.slice(match.index))) {
        parts.push(tex.slice(at, match.index));
        at = keep ? match.index : word.lastIndex;
      }
    }
    return [...parts, tex.slice(at)].map((part) => part.trim()).filter((part) => /[^\\,;:!\s]/.test(part));
  };
  const statements = (tex) => cut(tex, /^\\q?quad(?![a-zA-Z])/, false);
  // The first relation stays with its left side, which never stands alone.
  const steps = (tex) => {
    const [left, first, ...more] = cut(tex, relation, true);
    return relation.test(left) || !first ? [left, first, ...more].filter(Boolean) : [`${left} ${first}`, ...more];
  };
  const aligned = (rows) =>
    rows.length < 2 ? null : `\\begin{aligned}${rows.map((row) => `&${relation.test(row) ? "\\quad " : ""}${row}`).join("\\\\")}\\end{aligned}`;
  // The rows of what is written in rows, without their alignment; what has no rows is one.
  const written = (tex) => {
    const inner = tex.trim().match(/^\\begin\{(split|aligned)\}([\s\S]*)\\end\{\1\}$/);
    if (inner) return written(inner[2]);
    return cut(tex, /^\\\\/, false).map((row) => row.replace(/^\[[^\]]*\]/, ""));
  };
  const variants = (tex) => {
    const rows = written(tex).map((row) => cut(row, /^&/, false).join(" "));
    if (rows.some((row) => /\\tag|\\intertext/.test(row)) || /^\s*\\begin\{(align|gather|multline)/.test(tex)) return [];
    const nodes = [...new Set([aligned(rows.flatMap(statements)), aligned(rows.flatMap(statements).flatMap(steps))])]
      .filter(Boolean)
      .map((row) => MathJax.tex2chtml(row, { display: true }));
    // The styles of what is new, without which nothing has its width.
    MathJax.startup.document.processed.clear("updateDocument");
    MathJax.startup.document.updateDocument();
    return nodes;
  };

  const equations = [];
  const fit = () => {
    for (const equation of equations) {
      const place = equation.node.parentElement;
      const numbered = place.querySelector(":scope > .eqno") !== null;
      const shows = (node, below) => {
        if (node !== equation.node) equation.node.replaceWith(node);
        equation.node = node;
        node.classList.remove("n2t-wide");
        node.style.fontSize = `${equation.size}%`;
        place.classList.toggle("n2t-below", below);
        return node.clientWidth + 1 >= node.scrollWidth;
      };
      if (shows(equation.whole, false) || !equation.node.clientWidth) continue;
      equation.variants ??= variants(equation.tex);
      const ways = [equation.whole, ...equation.variants];
      if (ways.some((node) => shows(node, false))) continue;
      if (numbered && ways.some((node) => shows(node, true))) continue;
      const share = (0.99 * equation.node.clientWidth) / equation.node.scrollWidth;
      equation.node.style.fontSize = `${equation.size * Math.max(smallest, share)}%`;
    }
    mark();
  };

  // What scrolls sideways says so, and is within reach of the keyboard.
  const mark = () => {
    for (const wide of all(".bd-article table, .bd-article mjx-container[display=true], .bd-article pre")) {
      const over = wide.scrollWidth > wide.clientWidth + 1;
      wide.classList.toggle("n2t-wide", over && wide.tagName !== "PRE");
      if (over) wide.tabIndex = 0;
      else if (wide.tabIndex === 0) wide.removeAttribute("tabindex");
    }
  };

  // A search leads to the word, not to the top of a long page. Sphinx marks words 10 ms after it is asked to, which may
  // be after the page has loaded; timers of one delay go off in the order in which they were set.
  let marked = Promise.resolve();
  const searched = () => {
    if (document.querySelector("#search-results") || typeof SphinxHighlight === "undefined") return;
    const container = document.querySelector(".bd-article-container");
    if (!container) return;
    container.classList.add("body"); // where Sphinx looks for words
    SphinxHighlight.highlightSearchWords();
    marked = new Promise((done) => setTimeout(done, 10));
    container.classList.remove("body");
  };
  const toMark = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const found = (target && target.querySelector(".highlighted")) || article()?.querySelector(".highlighted");
    if (found) {
      reveal(found);
      found.tabIndex = -1;
      found.focus({ preventScroll: true });
      found.scrollIntoView({ block: "center", behavior: "instant" });
    } else if (target) {
      reveal(target);
    }
  };

  document.addEventListener("DOMContentLoaded", () => {
    // docutils marks the bibliography as a list whose entries are no list items, which screen readers stumble over.
    all(".citation-list[role=list]").forEach((list) => list.removeAttribute("role"));
    all(".citation[role=doc-biblioentry]").forEach((entry) => entry.removeAttribute("role"));
    // A formula that heads a column is drawn without text; its TeX names it.
    all("th").filter((head) => head.querySelector(".math")).forEach((head) => {
      const words = document.createElement("span");
      words.className = "visually-hidden tex2jax_ignore mathjax_ignore";
      words.textContent = head.textContent.replace(/\\[()]/g, "").trim();
      head.append(words);
    });
    // A table's empty corner heads nothing, and the sidebar's logo and search belong to no part of the page.
    all("th").filter((head) => !head.textContent.trim() && !head.querySelector("img")).forEach((head) => {
      const cell = document.createElement("td");
      cell.className = head.className;
      head.replaceWith(cell);
    });
    const sidebar = document.querySelector("#pst-primary-sidebar");
    sidebar?.setAttribute("role", "complementary");
    sidebar?.setAttribute("aria-label", "The book");
    // The name of a folded cell is what it shows.
    all("details.hide > summary[aria-label]").forEach((summary) => summary.removeAttribute("aria-label"));
    // What only sets up is one fold, not one for each cell.
    const [first, ...more] = all(".bd-article .cell.tag_preamble");
    if (first) {
      const fold = first.querySelector("details");
      for (const cell of more) {
        fold.append(...all(".cell_input", cell));
        cell.remove();
      }
      const [closed, open] = all("summary > p", fold);
      closed.textContent = "show set-up and imports";
      open.textContent = "hide set-up and imports";
    }
    // The title of a folded solution opens it, wherever it is clicked.
    for (const title of all(".admonition.dropdown > .admonition-title, .admonition.toggle > .admonition-title")) {
      all("a", title).forEach((link) => link.replaceWith(...link.childNodes));
      const name = title.innerText.trim();
      title.addEventListener(
        "click",
        (click) => {
          click.stopImmediatePropagation();
          toggleHidden(title.querySelector(".toggle-button"));
        },
        true,
      );
      title.querySelector(".toggle-button")?.setAttribute("aria-label", `Show or hide: ${name}`);
    }
    searched();
  });

  window.addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    for (const item of window.MathJax?.startup?.document?.math ?? []) {
      const node = item.typesetRoot;
      if (item.display && node?.isConnected) 
        equations.push({ node, whole: node, tex: item.math, size: parseFloat(node.style.fontSize) || 100 });
    }
    fit();
    await marked;
    toMark();
    let width = innerWidth, timer;
    window.addEventListener("resize", () => {
      clearTimeout(timer);
      timer = setTimeout(() => innerWidth !== width && ((width = innerWidth), fit()), 150);
    });
    // What is unfolded is measured then.
    document.addEventListener("toggle", () => fit(), true);
    window.addEventListener("hashchange", toMark);
  });

  // Paper is white, and shows what is folded.
  let before = null;
  window.addEventListener("beforeprint", () => {
    before = { theme: document.documentElement.dataset.theme, closed: all("details:not([open])") };
    document.documentElement.dataset.theme = "light";
    before.closed.forEach((details) => (details.open = true));
    article().style.width = "690px"; // of a sheet of A4, at the size of the screen's letters
    fit();
  });
  window.addEventListener("afterprint", () => {
    if (!before) return;
    document.documentElement.dataset.theme = before.theme;
    before.closed.forEach((details) => (details.open = false));
    article().style.width = "";
    before = null;
    fit();
  });
})();
