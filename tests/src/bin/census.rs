//! Prints what is on this machine that bears our marks, one object a line.

fn main() {
    for line in keel_tests::census::Census::take().found {
        println!("{line}");
    }
}
