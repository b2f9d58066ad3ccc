//! Documents: for each entity some passages of at most 28 words, each of fields that belong together.

use mempo_data::Document;

use crate::factbook::Entity;

const LONGEST_PASSAGE: usize = 28;
const LONGEST_FIELD: usize = 8;

/// Passages: a name, and the labels and fields it is made of.
pub(crate) const PASSAGES: [(&str, &[(&str, &str)]); 11] = [
    (
        "capital",
        &[
            ("capital", "Government/Capital/name"),
            ("coordinates", "Government/Capital/geographic coordinates"),
            ("time", "Government/Capital/time difference"),
            ("named", "Government/Capital/etymology"),
        ],
    ),
    (
        "money",
        &[
            ("currency", "Economy/Exchange rates/Currency"),
            ("inflation", "Economy/Inflation rate (consumer prices)/Inflation rate (consumer prices) 2023"),
            ("GDP", "Economy/GDP (official exchange rate)"),
            ("exports", "Economy/Exports - commodities"),
        ],
    ),
    (
        "elevation",
        &[
            ("highest point", "Geography/Elevation/highest point"),
            ("lowest point", "Geography/Elevation/lowest point"),
            ("mean elevation", "Geography/Elevation/mean elevation"),
            ("terrain", "Geography/Terrain"),
        ],
    ),
    (
        "symbols",
        &[
            ("national symbol", "Government/National symbol(s)"),
            ("national colors", "Government/National color(s)"),
            ("national anthem", "Government/National anthem(s)/title"),
        ],
    ),
    (
        "traffic",
        &[
            ("internet code", "Communications/Internet country code"),
            ("aircraft prefix", "Transportation/Civil aircraft registration country code prefix"),
            ("number of airports", "Transportation/Airports"),
            ("railway length", "Transportation/Railways/total"),
            ("internet users", "Communications/Internet users/percent of population"),
        ],
    ),
    (
        "government",
        &[
            ("government type", "Government/Government type"),
            ("legislature", "Government/Legislative branch/legislature name"),
            ("chief of state", "Government/Executive branch/chief of state"),
            ("legal system", "Government/Legal system"),
        ],
    ),
    (
        "independence",
        &[
            ("independence date", "Government/Independence"),
            ("national holiday", "Government/National holiday"),
            ("constitution", "Government/Constitution/history"),
        ],
    ),
    (
        "people",
        &[
            ("nationality", "People and Society/Nationality/adjective"),
            ("median age", "People and Society/Median age/total"),
            ("religions", "People and Society/Religions"),
            ("population", "People and Society/Population/total"),
        ],
    ),
    (
        "borders",
        &[
            ("coastline", "Geography/Coastline"),
            ("land neighbor", "Geography/Land boundaries/border countries"),
            ("location", "Geography/Location"),
            ("climate", "Geography/Climate"),
        ],
    ),
    (
        "resources",
        &[
            ("natural resources", "Geography/Natural resources"),
            ("agriculture", "Economy/Agricultural products"),
            ("industries", "Economy/Industries"),
        ],
    ),
    (
        "environment",
        &[
            ("issues", "Environment/Environmental issues"),
            ("hazards", "Geography/Natural hazards"),
            ("area", "Geography/Area - comparative"),
        ],
    ),
];

/// The passage that tells of this label, and the field it is taken from.
pub(crate) fn place(label: &str) -> Option<(&'static str, &'static str)> {
    PASSAGES
        .iter()
        .find_map(|(name, fields)| fields.iter().find(|(found, _)| *found == label).map(|(_, path)| (*name, *path)))
}

/// The name of an entity's passage in the corpus.
pub(crate) fn doc_id(entity: &Entity, passage: &str) -> String {
    format!("{}/{passage}", entity.code)
}

/// All passages of an entity.
pub(crate) fn documents(entity: &Entity) -> Vec<Document> {
    let passages = PASSAGES.iter().filter_map(|(name, fields)| {
        let parts = fields.iter().filter_map(|(label, path)| {
            let text = entity.text(path)?;
            Some(format!("{label}: {}", first_words(&text, LONGEST_FIELD)))
        });
        let parts: Vec<String> = parts.collect();
        let text = first_words(&parts.join("; "), LONGEST_PASSAGE);
        (!text.is_empty()).then(|| Document { doc_id: doc_id(entity, name), title: entity.name.clone(), text })
    });
    passages.collect()
}

fn first_words(text: &str, most: usize) -> String {
    let words: Vec<&str> = text.split(' ').take(most).collect();
    words.join(" ").trim_end_matches([',', ';', ':', '(']).to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn passages_are_short_and_labelled() {
        let fields = json!({"Government": {
            "Country name": {"conventional short form": {"text": "Peru"}},
            "Capital": {"name": {"text": "Lima"}, "etymology": {"text": "one two three four five six seven, eight nine"}},
        }});
        let entity = Entity::new("pe", "test", fields).unwrap();
        let expected = Document {
            doc_id: "pe/capital".into(),
            title: "Peru".into(),
            text: "capital: Lima; named: one two three four five six seven, eight".into(),
        };
        assert_eq!(documents(&entity), [expected]);
        assert_eq!(first_words("a b, c", 2), "a b");
    }
}
