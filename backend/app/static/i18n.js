// The page's language: looks words up, and puts them where the document asks for them.
import { WORDS as en } from "./words/en.js";
import { WORDS as vi } from "./words/vi.js";

const LANGUAGES = { en, vi };
let language = "en";

export function currentLanguage() {
  return language;
}

export function t(key, values = {}) {
  const text = LANGUAGES[language][key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

// A word of a table (values, looks); what it does not know is shown as the server calls it.
export function word(table, key, otherwise = key) {
  return LANGUAGES[language][table][key] ?? otherwise;
}

// A person's sentence for a problem of the server; what the table does not know is shown as the server says it.
export function errorText(problem) {
  const named = (problem.errors ?? []).map(({ field }) => fieldName(field));
  if (problem.code === "invalid_form" && named.length) return t("badFields", { fields: named.join(", ") });
  return word("errors", problem.code, [problem.detail ?? problem.message, problem.hint].filter(Boolean).join(" "));
}

// What the form calls a field of the server's.
function fieldName(field) {
  const words = LANGUAGES[language];
  return words[field] ?? words[`pick_${field}`] ?? field;
}

export function setLanguage(chosen) {
  language = chosen in LANGUAGES ? chosen : "en";
  document.documentElement.lang = language;
  document.title = `DeepHair · ${t("title")}`;
  for (const element of document.querySelectorAll("[data-i18n]")) element.textContent = t(element.dataset.i18n);
  for (const element of document.querySelectorAll("[data-i18n-placeholder]")) element.placeholder = t(element.dataset.i18nPlaceholder);
  for (const element of document.querySelectorAll("[data-i18n-label]")) {
    element.setAttribute("aria-label", t(element.dataset.i18nLabel));
    if (element.matches("button")) element.title = t(element.dataset.i18nLabel);
  }
}

export function duration(seconds) {
  return seconds < 90 ? t("seconds", { n: Math.max(1, Math.round(seconds)) }) : t("minutes", { n: Math.round(seconds / 60) });
}
