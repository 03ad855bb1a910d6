//! Defects that are planted into the rendered overlays, to show that the rules find them.

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::{Findings, Installation, Object, rules};

pub fn of(overlay: &str) -> impl Iterator<Item = &'static str> {
    include_str!("../planted.list")
        .lines()
        .filter_map(move |line| line.strip_prefix(overlay)?.strip_prefix(' '))
}

/// Plants the defect of a line, `kind/name path JSON => finding`, and returns the rule that finds it.
pub fn found(set: &Installation, line: &str) -> anyhow::Result<&'static str> {
    let (defect, expected) = line.split_once(" => ").context("no =>")?;
    let [object, path, value] = defect.splitn(3, ' ').collect::<Vec<_>>()[..] else {
        bail!("not three parts")
    };
    let (value, mut set) = (serde_json::from_str(value)?, set.clone());
    let place = set.objects.iter().position(|it| it.id.starts_with(object)).context("no such object")?;
    match path {
        "new" => set.objects.push(Object::new(value)),
        "gone" => _ = set.objects.remove(place),
        path => plant(&mut set.objects[place].body, path, value).context("no such path")?,
    }
    for (name, rule) in rules::ALL {
        let mut findings = Findings::default();
        rule(&set, &mut findings);
        if findings.0.iter().any(|finding| finding.contains(expected)) {
            return Ok(name);
        }
    }
    bail!("not found")
}

/// Sets what is at a path; null removes it. Items of lists are named by their name or place.
fn plant(body: &mut Value, path: &str, defect: Value) -> Option<()> {
    let path = path.replace('@', "spec/template/spec/containers/0/").replace('+', "spec/template/spec/");
    let (parents, last) = path.rsplit_once('/')?;
    let mut parent = body;
    for part in parents.split('/').chain([last]) {
        let part = part.replace('~', "/");
        if defect.is_null() && part == last.replace('~', "/") && parent.is_object() {
            return parent.as_object_mut()?.remove(&part).map(drop);
        }
        parent = match parent.as_array().map(|items| items.iter().position(|item| item["name"] == part)) {
            Some(named) => parent.get_mut(named.or_else(|| part.parse().ok())?)?,
            None => &mut parent[part],
        };
    }
    *parent = defect;
    Some(())
}
