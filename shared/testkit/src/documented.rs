//! Compares answers with the service's `OpenAPI` document: every path, method, status, header and body must be documented.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use jsonschema::Validator;
use protocol::event::is_reserved;
use serde_json::{Value, json};

use crate::http::Answer;

pub struct OpenApiDocument {
    root: Value,
    validators: Mutex<HashMap<String, Arc<Validator>>>,
}

impl OpenApiDocument {
    pub fn new(text: &str) -> Self {
        let root: Value = serde_json::from_str(text).expect("the document is JSON");
        assert_eq!(root["openapi"], "3.1.0");
        Self { root, validators: Mutex::default() }
    }

    pub fn check(&self, method: &str, path: &str, answer: &Answer) {
        if method == "OPTIONS" {
            return; // CORS is a layer of its own.
        }
        let Some((template, item)) = self.path(path) else {
            assert_eq!(answer.status, 404, "{method} {path} is answered and not documented");
            return self.check_problem(answer);
        };
        let name = if method == "HEAD" { "get" } else { &method.to_lowercase() };
        let Some(operation) = item.get(name) else {
            // A disabled path is not documented.
            let (status, allow) = (answer.status, answer.header("allow"));
            assert!([404, 405].contains(&status), "{method} {path}: {status} is not documented");
            assert!(status == 404 || allow.is_some(), "{method} {path}: 405 without Allow");
            return;
        };
        let what = format!("{method} {template}: {}", answer.status);
        let response = &operation["responses"][answer.status.to_string()];
        assert!(!response.is_null(), "{what} is not documented: {}", answer.text());
        let response = self.resolve(response);
        for (header, rules) in response["headers"].as_object().into_iter().flatten() {
            let rules = self.resolve(rules);
            match answer.header(header) {
                Some(value) => {
                    let number = value.parse::<i64>().map_or(json!(value), |number| json!(number));
                    let value = if rules["schema"]["type"] == "integer" { number } else { json!(value) };
                    self.validate(&rules["schema"], &value, &format!("{what}, header {header}"));
                }
                None => assert_ne!(rules["required"], true, "{what} has no {header}"),
            }
        }
        let content = response["content"].as_object();
        let Some((media_type, content)) = content.and_then(|content| content.iter().next()) else {
            assert!(answer.body.is_empty(), "{what} has a body: {}", answer.text());
            return;
        };
        let given = answer.header("content-type").unwrap_or_default();
        let essence = given.split(';').next().unwrap_or_default();
        assert_eq!(essence, media_type, "{what}");
        if method == "HEAD" {
            return;
        }
        if media_type == "application/x-ndjson" {
            for line in answer.text().lines() {
                let line = serde_json::from_str(line).expect("each line is JSON");
                self.validate(&content["schema"], &line, &what);
            }
        } else {
            self.validate(&content["schema"], &answer.json(), &what);
        }
    }

    fn check_problem(&self, answer: &Answer) {
        if !answer.body.is_empty() {
            self.validate(&json!({ "$ref": "#/components/schemas/Problem" }), &answer.json(), "404");
        }
    }

    /// An event as it is on the wire; `None`: without a name.
    pub fn check_event(&self, name: Option<&str>, data: &Value) {
        let events = &self.root["paths"]["/api/messages"]["get"]["x-events"];
        let name = name.unwrap_or("(unnamed)");
        let is_published = events[name].is_null() && !is_reserved(name);
        let schema = &events[if is_published { "(published)" } else { name }];
        assert!(!schema.is_null(), "event {name:?} is not documented");
        self.validate(schema, data, &format!("event {name:?}"));
    }

    /// The path template that matches. Names take precedence over parameters.
    fn path(&self, path: &str) -> Option<(&str, &Value)> {
        let segments: Vec<_> = path.split('/').collect();
        let fits = |template: &str| {
            let parts: Vec<_> = template.split('/').collect();
            let fit = |(part, segment): (&&str, &&str)| {
                part.starts_with('{') && !segment.is_empty() || part == segment
            };
            parts.len() == segments.len() && parts.iter().zip(&segments).all(fit)
        };
        let paths = self.root["paths"].as_object().expect("a document has paths");
        let fitting = paths.iter().filter(|(template, _)| fits(template));
        fitting
            .min_by_key(|(template, _)| template.matches('{').count())
            .map(|(name, item)| (name.as_str(), item))
    }

    fn resolve<'a>(&'a self, value: &'a Value) -> &'a Value {
        let reference = value["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
        reference.map_or(value, |pointer| {
            self.root.pointer(pointer).expect("a reference of the document leads somewhere")
        })
    }

    fn validate(&self, schema: &Value, value: &Value, what: &str) {
        let key = schema.to_string();
        let validator = self.validators.lock().expect("no holder panics").get(&key).cloned();
        let validator = validator.unwrap_or_else(|| {
            let mut root = schema.clone();
            root["components"] = self.root["components"].clone();
            let validator = jsonschema::draft202012::new(&root).expect("a schema of the document is one");
            let validator = Arc::new(validator);
            self.validators.lock().expect("no holder panics").insert(key, validator.clone());
            validator
        });
        let errors: Vec<_> =
            validator.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(errors.is_empty(), "{what} is not as documented: {errors:?} in {value}");
    }
}
