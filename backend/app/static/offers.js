// What this server offers beyond two photos and words, read from its OpenAPI document; what it does not offer is not shown.
import * as api from "./api.js";

const PICKERS = ["length", "curl", "color", "bangs"];

// {mask, gallery: true where offered; mode: {values, first} or null; strength: true or false; pickers: {name: values}}
export async function readOffers() {
  const document = await api.openapi();
  const content = document.paths["/api/v1/jobs"].post.requestBody.content["multipart/form-data"];
  const { properties } = content.schema;
  const mode = enumOf(properties.mode);
  return {
    mask: "mask" in properties,
    gallery: "/api/v1/gallery" in document.paths,
    mode: mode.length > 1 ? { values: mode, first: properties.mode.default ?? mode[0] } : null,
    strength: "strength" in properties,
    pickers: Object.fromEntries(PICKERS.map((name) => [name, enumOf(properties[name])]).filter(([, values]) => values.length)),
  };
}

function enumOf(schema) {
  if (!schema) return [];
  if (schema.enum) return schema.enum.filter((value) => value !== null);
  return (schema.anyOf ?? []).flatMap(enumOf);
}
