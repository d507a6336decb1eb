// docutils marks the bibliography as a list whose entries are no list items, which screen readers stumble over.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".citation-list[role=list]").forEach((list) => list.removeAttribute("role"));
});
