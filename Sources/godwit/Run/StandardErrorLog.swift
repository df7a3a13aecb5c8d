import CommandLineKit
import Logging

/// Log lines for people: `web: migration active`, with the level where it is worth a word.
struct StandardErrorLog: LogHandler {
    let name: String
    var logLevel = Logger.Level.info
    var metadata: Logger.Metadata = [:]

    init(name: String) { self.name = name }

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
        let level = event.level >= .warning ? "\(event.level): " : ""
        Terminal.error.write("\(name): \(level)\(event.message)\n")
    }
}
