@main
enum Godwit {
    static func main() {}
}
